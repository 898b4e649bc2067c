"""vLLM, as released: its plugin entry points and nothing else.

`guidance.py` is the logits processor (guided decoding), `values.py` the value model as a pooling
model. `register` is the entry point `vllm.general_plugins`, which vLLM calls in every process.
"""

TESTED = ("0.25.0",)
"""vLLM releases that this package was run with."""
PROCESSOR = "lenvm.engines.vllm.guidance:LengthGuidance"
"""What `--logits-processors` takes."""
ARCHITECTURE = "LengthValueModel"


def register() -> None:
    """Make the value model's architecture known. Imports nothing heavy; changes nothing else."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "lenvm.engines.vllm.values:VllmLengthValueModel")
