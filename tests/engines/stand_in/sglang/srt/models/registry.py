class _ModelRegistry:
    def __init__(self):
        self.models = {}

    def resolve_model_cls(self, architectures):
        return self.models[architectures[0]], architectures[0]


ModelRegistry = _ModelRegistry()
