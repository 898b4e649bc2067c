"""`python -m sglang.launch_server` in tests."""

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    main()
