"""Post-training quantisation of diffusion UNets: tensors in, tensors out."""
