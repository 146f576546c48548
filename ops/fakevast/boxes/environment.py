"""What vast.ai puts into the environment of a container, and which ports it publishes. Pure."""

from __future__ import annotations

from ops.fakevast.cloud.instance import Instance

Ports = dict[str, list[dict[str, str]]]


def container_environment(instance: Instance, secrets: dict[str, str]) -> dict[str, str]:
    """The account's secrets, the instance's own key, number and ports, and the renter's env."""
    given = {key: value for key, value in instance.env.items() if not key.startswith("-")}
    ports = {
        f"VAST_TCP_PORT_{name.split('/')[0]}": rows[0]["HostPort"]
        for name, rows in instance.ports.items()
        if name.endswith("/tcp")
    }
    return {
        **secrets,
        "CONTAINER_API_KEY": instance.key,
        "CONTAINER_ID": str(instance.id),
        "VAST_CONTAINERLABEL": f"C.{instance.id}",
        "PUBLIC_IPADDR": "127.0.0.1",
        "GPU_COUNT": str(instance.num_gpus),
        "DATA_DIRECTORY": "/workspace",
        "JUPYTER_TOKEN": instance.key[:32],
        "OPEN_BUTTON_TOKEN": instance.key[:32],
        "SSH_PUBLIC_KEY": "\n".join(key["public_key"] for key in instance.ssh_keys),
        **ports,
        **given,
    }


def published_ports(instance: Instance, ssh_port: int) -> Ports:
    """The record's `ports`: the direct SSH port where the order and the machine allow one.

    Ports that the renter asked for (`-p 8080:8080` in env) are published as they are.
    """
    ports: Ports = {}
    direct = "direc" in instance.runtype or instance.runtype == "ssh"
    if direct and instance.offer.get("direct_port_count", 1) > 0:
        both = ("0.0.0.0", "::")
        ports["22/tcp"] = [{"HostIp": ip, "HostPort": str(ssh_port)} for ip in both]
    for key in instance.env:
        if key.startswith("-p "):
            port, _, kind = key[3:].strip().rsplit(":", 1)[-1].partition("/")
            ports[f"{port}/{kind or 'tcp'}"] = [{"HostIp": "0.0.0.0", "HostPort": port}]
    return ports
