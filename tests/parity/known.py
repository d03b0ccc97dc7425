"""Name the golden files of which a run compares only some in other dtypes than float64.

A file that is not named here is compared in all.
"""

KNOWN = frozenset(
    """
    add_layer_norm add_rms_norm causal_conv1d_00 causal_conv1d_01 causal_conv1d_02 causal_conv1d_03
    channel_patch_embed_order channelvim_cf channelvim_hcs_train channelvim_overlap channelvim_sf
    channelvit_full channelvit_nonsquare channelvit_subset classification_losses ema
    fastchannelvim_2dcompress_max fastchannelvim_2dcompress_mean fastchannelvim_cf_max fastchannelvim_cf_mean
    fastchannelvim_colwise fastchannelvim_hcs_train fastchannelvim_sf_max fastchannelvim_sf_mean
    fastchannelvim_subset_eval fastmaskvim_mae_nomask fastmaskvim_mae_norotate_nopostnorm_rawpix
    fastmaskvim_mae_r50 fastmaskvim_mae_r75 fastvim_default fastvim_droppath_train
    fastvim_fastpath_nopostnorm_nogate fastvim_features fastvim_layernorm fastvim_layernorm_unfused_pool_none
    fastvim_layerscale fastvim_max fastvim_mixer_max fastvim_mixer_mean fastvim_nopos fastvim_nopostnorm
    fastvim_norotate_colwise fastvim_norotate_rowwise fastvim_padded_input fastvim_pool_all fastvim_pool_max
    fastvim_rotate_colwise fastvim_scale025 fastvim_ssmcfg fastvim_wide hcs_channelvit_eval hcs_channelvit_train
    linear_probe_head mae_vit_r50 mae_vit_r75 masked_row_means_constant_00 masked_row_means_constant_01
    masked_row_means_true_00 masked_row_means_true_01 masking_and_transpose_ids mm_fastvim_features
    mm_vim_features_resized patchify_loss pos_embed_resize schedules selective_scan_00_L1 selective_scan_01_L7
    selective_scan_02_L14 selective_scan_03_L64 selective_scan_04_L200 selective_scan_05_L14
    selective_scan_06_L64 selective_scan_07_L14 selective_scan_08_L200 selective_scan_09_L64 sincos_pos_embed
    train_steps_supervised vim_droppath_train vim_headcls vim_layernorm vim_mae_r50 vim_mae_r75 vim_midcls
    vim_nocls_all vim_nocls_max vim_nocls_mean vim_nocls_none vim_nocls_resized vim_nopostnorm
    vim_nopostnorm_slowpath_nogate vit_cls vit_cls_nonsquare vit_dino vit_gap

    coco_eval dense_schedules det_anchors det_assign_empty det_assign_rpn det_assign_s0 det_assign_s1
    det_assign_s2 det_bboxhead_agnostic det_bboxhead_cls det_cascade_detect_raw det_cascade_detect_rescaled
    det_cascade_train det_deltas_0 det_deltas_1 det_deltas_2 det_deltas_3 det_iou det_maskhead det_nms det_paste
    det_postprocess_0 det_postprocess_1 det_roi_extract_14 det_roi_extract_7 det_roialign_14
    det_roialign_28x5_ratio2 det_roialign_7 det_rpn det_simplefpn seg_crop_0 seg_crop_1 seg_crop_2 seg_crop_3
    seg_fcnhead_eval seg_fcnhead_train seg_loss_0 seg_loss_1 seg_metrics seg_model_train seg_neck_deconv_eval
    seg_neck_deconv_train seg_neck_multilevel seg_photometric_0 seg_photometric_1 seg_photometric_2
    seg_photometric_3 seg_ppm_eval seg_ppm_train seg_resize_normalise seg_slide_0 seg_slide_1 seg_slide_2
    seg_slide_3 seg_uperhead_pyramid_eval seg_uperhead_pyramid_train seg_uperhead_same_eval
    seg_uperhead_same_train seg_uperhead_same_train_dropout
    """.split()
)
