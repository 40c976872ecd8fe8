"""Part of the stand-in for `vllm`."""
