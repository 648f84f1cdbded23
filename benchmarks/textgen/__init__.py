"""Text generation with many adapters: requests, engines and figures of bench_textgen_lora."""
