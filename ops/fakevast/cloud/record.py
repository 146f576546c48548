"""What the API shows of an instance: its record and its bill. Pure."""

from __future__ import annotations

from typing import Any

from ops.fakevast.cloud.instance import GIGABYTE, HOUR_S, Instance

_OF_THE_OFFER = """
    machine_id host_id bundle_id num_gpus gpu_name gpu_ram gpu_frac gpu_lanes gpu_mem_bw pcie_bw
    pci_gen bw_nvlink compute_cap total_flops dlperf score cpu_name cpu_cores cpu_cores_effective
    cpu_ram cpu_arch inet_up inet_down inet_up_cost inet_down_cost internet_up_cost_per_tb
    internet_down_cost_per_tb storage_cost disk_bw disk_name min_bid reliability2 geolocation
    verification hosting_type driver_version cuda_max_good mobo_name os_version static_ip
    direct_port_count external webpage logo has_avx vericode rentable dlperf_per_dphtotal
    flops_per_dphtotal credit_discount_max
""".split()  # noqa: SIM905
_ALWAYS = {
    "ssh_host": "127.0.0.1",
    "ssh_idx": "4",
    "public_ipaddr": "127.0.0.1\n",
    "local_ipaddrs": "127.0.0.1 \n",
    "time_remaining": "",
    "time_remaining_isbid": "",
    "gpu_arch": "nvidia",
    "cpu_util": 0.0,
    "vmem_usage": None,
    "template_id": None,
    "template_name": None,
    "client_run_time": 1.1,
    "host_run_time": 5184000.0,
    "country_code": None,
    "rented": True,
    "discount_rate": 0.0,
    "bundled_results": 1,
}


def record(instance: Instance, now: float) -> dict[str, Any]:
    """The row of `GET /instances/`, with the oddities of the live one.

    Numbers from the first moment, a stray newline in the address, no ports before it runs.
    """
    shown = {name: instance.offer.get(name) for name in _OF_THE_OFFER}
    shown |= _ALWAYS | _order(instance) | _state(instance, now) | _price(instance)
    return shown | instance.shown_as


def _order(instance: Instance) -> dict[str, Any]:
    offer = instance.offer
    return {
        "id": instance.id,
        "label": instance.label,
        "start_date": instance.created_at,
        "end_date": instance.end_date,
        "extra_env": [[key, value] for key, value in instance.env.items()],
        "image_uuid": instance.image,
        "image_runtype": instance.runtype,
        "image_args": instance.args,
        "onstart": instance.onstart,
        "jupyter_token": instance.key[:32],
        "gpu_totalram": offer["gpu_ram"] * instance.num_gpus,
        "mem_limit": offer["cpu_ram"] / 1000 * offer["gpu_frac"],
        "disk_space": instance.disk_gb,
        "template_hash_id": instance.template_hash_id,
        "volume_info": instance.volume_info or [],
    }


def _state(instance: Instance, now: float) -> dict[str, Any]:
    running, since = instance.actual_status == "running", instance.running_since
    return {
        "actual_status": instance.actual_status,
        "intended_status": instance.intended_status,
        "cur_state": instance.cur_state,
        "next_state": instance.next_state,
        "status_msg": instance.status_msg,
        "ssh_port": instance.ssh_port,
        "machine_dir_ssh_port": instance.ssh_port,
        "ports": instance.ports if running else {},
        "duration": instance.end_date - now,
        "uptime_mins": (now - since) / 60 if running and since else None,
        "gpu_util": 0.0 if running else None,
        "gpu_temp": 41.0 if running else None,
        "mem_usage": 0.5 if running else None,
        "disk_usage": 0.1 if running else None,
        "disk_util": 0.1 if running else -1.0,
        "inet_up_billed": instance.meter.bytes_out / 1e6,
        "inet_down_billed": instance.meter.bytes_in / 1e6,
    }


def _price(instance: Instance) -> dict[str, Any]:
    gpu, disk = instance.gpu_usd_per_hour, instance.disk_usd_per_hour
    quote = {
        "gpuCostPerHour": gpu,
        "diskHour": disk,
        "totalHour": gpu + disk,
        "discountTotalHour": 0,
        "discountedTotalPerHour": gpu + disk,
    }
    return {
        "dph_base": gpu,
        "dph_total": gpu + disk,
        "storage_cost": instance.storage_cost,
        "storage_total_cost": disk,
        "is_bid": instance.bid is not None,
        "search": quote,
        "instance": quote,
    }


def charge(instance: Instance, now: float) -> dict[str, Any]:
    """The bill, one row of `/charges/`. Once the instance is destroyed it stays as it is."""
    meter, offer = instance.meter, instance.offer
    hours, rate = meter.gpu_s / HOUR_S, instance.gpu_usd_per_hour
    gb_hours, gb_in, gb_out = (
        meter.disk_gb_s / HOUR_S,
        meter.bytes_in / GIGABYTE,
        meter.bytes_out / GIGABYTE,
    )
    items = {
        "gpu": (meter.gpu_usd, f"{hours:.3f} hours at ${rate:.3f}/hour"),
        "disk": (
            meter.disk_usd,
            f"{gb_hours:.3f} GB-hours at ${offer['storage_cost']:.3f}/GB/month",
        ),
        "bwd": (meter.in_usd, f"{gb_in:.6f} GB at ${offer['inet_down_cost']:.4f}/GB"),
        "bwu": (meter.out_usd, f"{gb_out:.6f} GB at ${offer['inet_up_cost']:.4f}/GB"),
    }
    span = {"start": instance.created_at, "end": instance.destroyed_at or now}
    source = f"instance-{instance.id}"
    return {
        **span,
        "type": "instance",
        "source": source,
        "description": f"Instance {instance.id}: {instance.num_gpus}x {offer['gpu_name']}",
        "amount": round(meter.usd, 6),
        "metadata": {
            "label": instance.label,
            "template_id": None,
            "instance_id": instance.id,
            "machine_id": instance.machine_id,
        },
        "items": [
            {
                **span,
                "type": kind,
                "source": source,
                "description": text,
                "amount": round(usd, 6),
                "metadata": {},
                "items": [],
            }
            for kind, (usd, text) in items.items()
        ],
    }
