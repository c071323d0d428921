"""What is done when: pure Python and NumPy, without JAX and without the rest of the package."""

from bigbatch.schedule.phases import (
    STRATEGIES,
    Limits,
    Phase,
    Recipe,
    find_phase,
    learning_rate_at,
    noise_scale,
    noise_scale_approximate,
    nominal_noise_scale,
    notes,
    phase_at,
    plan_phases,
    scale_up,
    spans,
)

__all__ = [
    "STRATEGIES", "Limits", "Phase", "Recipe", "find_phase", "learning_rate_at", "noise_scale",
    "noise_scale_approximate", "nominal_noise_scale", "notes", "phase_at", "plan_phases",
    "scale_up", "spans",
]
