"""GPU memory, streams and graphs through whichever CUDA binding is installed."""
