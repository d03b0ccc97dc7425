"""Programs that `fastvim export` wrote under different versions of JAX, and the script that writes them."""
