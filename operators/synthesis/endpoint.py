"""Generation by a server with OpenAI's chat interface: another team's vLLM, a gateway, a provider."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from operators.config import Settings
from operators.synthesis.requests import EngineError, EngineSession, Reply, Request
from operators.tables import content_hash


class EndpointSettings(Settings):
    """Where the server is and how hard it may be pressed."""

    url: str = Field(description="base address, such as http://127.0.0.1:8000/v1")
    key_variable: str = Field(default="OPENAI_API_KEY", description="environment variable that holds the key; it may be unset")
    revision: str | None = Field(
        default=None, description="what names the weights behind the model's name; without it the address does"
    )
    concurrency: int = Field(default=64, ge=1, description="requests under way at most; fewer while the server complains")

    def revision_of(self, model: str) -> str:
        """The model's name with the revision that the user states, or with the address."""
        return content_hash(["endpoint", model, self.revision or self.url])


class EndpointEngine:
    """A handle on a server."""

    def __init__(self, model: str, settings: EndpointSettings) -> None:
        self.model, self.settings = model, settings

    @property
    def revision(self) -> str:
        return self.settings.revision_of(self.model)

    @property
    def in_flight(self) -> int:
        return 2 * self.settings.concurrency

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def open(self) -> EngineSession:
        raise EngineError("endpoints are not there yet")


__all__ = ["EndpointEngine", "EndpointSettings", "Reply", "Request", "Sequence"]
