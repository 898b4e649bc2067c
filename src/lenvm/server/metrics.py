"""What a server counts of itself, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)


class Metrics:
    """The counters of one server; each has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"lenvm_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(f"lenvm_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "HTTP requests", ("path", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of admitted prompts")
        self.tokens = counter("generated_tokens", "Generated tokens")
        self.completions = counter("completions", "Finished completions", ("finish_reason",))
        self.step_seconds = counter("step_seconds", "Time in engine steps")
        self.guidance_seconds = counter("guidance_seconds", "Time of it in guidance")
        self.duration = histogram("request_seconds", "HTTP requests", SECONDS, ("path",))
        self.first_token = histogram(
            "time_to_first_token_seconds", "Admission to first token", SECONDS, ("guided",)
        )
        self.between_tokens = histogram(
            "inter_token_seconds", "Token to token", SECONDS, ("guided",)
        )
        self.prediction_error = histogram(
            "prediction_error_ratio", "|predicted - length| / length, no control", RATIOS
        )
        self.target_error = histogram(
            "target_error_ratio", "|target - length| / target, equal_to", RATIOS
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when asked for."""
        Gauge(f"lenvm_{name}", text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
