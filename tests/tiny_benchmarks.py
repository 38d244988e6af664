"""Made-up results of the benchmarks, of the shape that they print."""

from typing import Any


def _times(shared: float, private: float, overhead: float) -> dict[str, float]:
    seconds = shared + private
    return {
        "seconds": seconds,
        "shared_seconds": shared,
        "private_seconds": private,
        "compute_seconds": seconds - overhead,
        "overhead_seconds": overhead,
        "workers": 2,
        "threads": 1,
    }


def _size(population: int, cohort: int, *measured: float) -> dict[str, float]:
    names = ("prepare_seconds", "prepare_mib", "round_seconds", "run_mib")
    return {"population": population, "cohort": cohort, **dict(zip(names, measured, strict=True))}


def _way(name: str, users: int, *measured: float | None) -> dict[str, Any]:
    names = ("milliseconds", "tflops", "share", "ratio", "peak_gib", "first_seconds")
    return {"name": name, "users": users, **dict(zip(names, measured, strict=True))}


ENGINE: dict[str, Any] = {
    "model": "some-model",
    "users": 12,
    "rounds": 2,
    "cores": 2,
    "runtimes": {
        "engine": _times(1.11, 2.1, 0.31),
        "one_by_one": _times(11.1, 21.0, 0.5),
        "ray": _times(22.2, 42.0, 31.0),
        "pfl": _times(5.55, 0.0, 0.55),
    },
    "ratio_one_by_one": 10.0,
    "ratio_ray": 20.0,
    "ratio_pfl": 5.0,
    "ratio_ray_overhead": 100.0,
    "largest_difference": 3.2e-6,
}

SCALING: dict[str, Any] = {
    "cores": 2,
    "by_cohort": [
        _size(1000, 8, 1.5, 210.0, 0.25, 310.0),
        _size(20_000, 10_000, 9.0, 230.0, 123.456, 345.0),
    ],
    "by_population": [
        _size(1000, 8, 1.5, 210.0, 0.25, 310.0),
        _size(1_000_000, 8, 600.1, 240.0, 0.5, 320.0),
    ],
    "memory_ratio_population": 320 / 310,
    "memory_ratio_population_prepare": 240 / 210,
    "memory_ratio_cohort": 345 / 310,
}

CEILING: dict[str, Any] = {
    "device": "Some GPU",
    "torch": "2.10.0",
    "shape": "135m",
    "parameters": 134_515_008,
    "type": "bfloat16 autocast",
    "steps": {"steps": 10, "rows": 2, "tokens": 128},
    "ceiling_tflops": 300.0,
    "products_tflops": {"torch": 300.0},
    "points": [
        _way("one by one", 1, 400.0, 3.5, 0.0117, 1.0, 1.2, 5.0),
        _way("compiled", 64, 8.0, 175.0, 0.583, 50.0, None, 90.0),
    ],
}


def _stage(cohort: int, superlink: float) -> dict[str, Any]:
    return {
        "round_seconds": 12.5,
        "rounds": [(cohort, cohort - 1, 12.5)],
        "accepted": cohort - 1,
        "dropped": {"no answer": 1},
        "refused": {},
        "seconds": 13.0,
        "cpu_seconds": {"superlink": 4.0, "serverapp": 1.0},
        "cpu_per_contribution": {"superlink": 0.04, "serverapp": 0.01},
        "own_mib": {"superlink": superlink, "serverapp": 400.0},
        "peak_mib": {"superlink": superlink + 50, "serverapp": 530.0},
        "cohort": cohort,
        "enrolments_per_second": 40.0,
        "requests_per_second": 150.0,
        "refused_at_the_door": {"too often": 3},
    }


LOAD: dict[str, Any] = {
    "light": 1000,
    "real": 12,
    "cores": 2,
    "stages": [
        _stage(50, 200.0),
        {
            **_stage(400, 220.0),
            "soak": {
                "minutes": 30.0,
                "rounds": 77,
                "accepted": 30_000,
                "dropped": {},
                "refused": {},
                "round_seconds": 22.0,
                "growth_mib_per_hour": {
                    "superlink": {
                        "per_hour": 0.5,
                        "low": -1.5,
                        "high": 2.5,
                        "first": 219.0,
                        "last": 221.0,
                    }
                },
            },
        },
    ],
    "memory_ratio": {"superlink": 1.1, "serverapp": 1.0},
    "peak_ratio": {"superlink": 1.08, "serverapp": 1.0},
}

DEPLOYMENT: dict[str, Any] = {
    "devices": 3,
    "rounds": 4,
    "training_seconds": 0.25,
    "homefire_seconds": 1.25,
    "flower_seconds": 10.25,
    "ratio": 0.1,
    "cores": 2,
}
