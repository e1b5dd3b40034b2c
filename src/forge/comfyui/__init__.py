"""Everything that speaks to ComfyUI, and the simulator that stands in for it."""
