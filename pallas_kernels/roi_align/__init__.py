"""Sum cells of feature maps into the bins of boxes (RoIAlign) as one GPU kernel."""
