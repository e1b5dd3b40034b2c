"""A protocol-true ComfyUI without a model: for tests, for development, as yardstick in benchmarks.

::

    async with Simulator(SimulatorOptions(render_ms=(50, 200))) as simulator:
        ...  # speak to simulator.url as to a ComfyUI

It answers HTTP and WebSocket as the recorded servers (0.27.0; 0.3.64 on request) do, quirks included, saves
real PNG files, and can be broken in every way a ComfyUI was seen to break: see `Faults`. While it runs,
`/simulator/...` changes faults and durations and shows the `Record` of what really happened.
"""

from forge.comfyui.simulator.options import Faults, SimulatorOptions, faults_from
from forge.comfyui.simulator.server import Simulator, run

__all__ = ["Faults", "Simulator", "SimulatorOptions", "faults_from", "run"]
