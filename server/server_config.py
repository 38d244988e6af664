"""Where a server listens, under which names, and how much it lets in: `server.toml`."""

import ipaddress
import re

from pydantic import Field, ValidationInfo, field_validator, model_validator

from homefire.common.address import canonical_host, split_address, with_port
from homefire.common.config import Frozen

LOOPBACK_NAMES = ("localhost", "127.0.0.1")


class LimitsConfig(Frozen):
    """What the public listener lets in."""

    body_bytes: int = Field(6 << 20, ge=1 << 16, description="Of a request; Flower's chunks: 5 MB.")
    requests: float = Field(20.0, gt=0, description="A second and device, on average.")
    burst: int = Field(200, ge=1, description="Requests of a device at once.")
    connections: int = Field(2048, ge=1, description="Requests under way; more get 503.")
    strangers: int = Field(
        256, ge=1, description="Connections of one address on which no device was answered yet."
    )
    waiting: int = Field(4096, ge=0, description="Devices that wait for a plan, besides those.")
    seconds: float = Field(60.0, gt=0, description="That a request's body may take.")


class ServerConfig(Frozen):
    """Where a server listens, and under which names.

    Guarantees:
        One way: names are as `canonical_host` writes them, for tickets, certificate and door alike.
    """

    names: tuple[str, ...] = Field(min_length=1, description="Names and addresses for devices.")
    fleet: str = Field("0.0.0.0:9092", description="For devices.")
    registry: str = Field("0.0.0.0:9093", description="Of releases.")
    private: int = Field(9095, ge=1, le=65535, description="Flower's APIs; this machine alone.")
    operator: int = Field(9096, ge=1, le=65535, description="Page and metrics; likewise.")
    ticket_hours: float = Field(168.0, gt=0, description="How long a ticket can be redeemed.")
    limits: LimitsConfig = LimitsConfig()

    @property
    def all_names(self) -> tuple[str, ...]:
        """What its certificate is for: the names of this machine to itself as well."""
        return tuple(dict.fromkeys([*self.names, *LOOPBACK_NAMES]))

    @field_validator("names")
    @classmethod
    def _canonical(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(canonical_host(name) for name in value))

    @field_validator("fleet", "registry")
    @classmethod
    def _listens(cls, value: str, info: ValidationInfo) -> str:
        host, _, port = value.rpartition(":")
        try:
            host = canonical_host(host)
            ipaddress.ip_address(host)  # of this machine: names could be others'
        except ValueError as error:
            example = cls.model_fields[str(info.field_name)].default
            raise ValueError(f"give ADDRESS:PORT, such as {example}, not {value!r}") from error
        if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
            raise ValueError(f"{port} is no port: 1 to 65535")
        return with_port(host, port)

    @model_validator(mode="after")
    def _apart(self) -> "ServerConfig":
        ports = [split_address(each)[1] for each in (self.fleet, self.registry)]
        ports += [self.private, self.operator]
        if len(set(ports)) < len(ports):
            raise ValueError("fleet, registry, private and operator need a port each")
        return self


def server_toml(config: ServerConfig) -> str:
    """The text of `server.toml`, for people to change."""
    names = ", ".join(f'"{name}"' for name in config.names)
    return f"""# Where this server listens. Names are what devices connect to.
names = [{names}]
fleet = "{config.fleet}"
registry = "{config.registry}"
private = {config.private}
operator = {config.operator}
ticket_hours = {config.ticket_hours:g}
"""
