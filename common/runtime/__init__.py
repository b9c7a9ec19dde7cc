"""Where training runs: device, CUDA graph, parallel runs, data-parallel ranks, resumption."""
