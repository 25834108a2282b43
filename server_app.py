"""The example's ServerApp, and, run as a program, one replica: ``python server_app.py --id 0``."""

from __future__ import annotations

from pathlib import Path

if __name__ == "__main__":  # before the heavy imports: a replica's own process stays light
    from flwr_ha.example import run_example

    raise SystemExit(run_example(Path(__file__).parent))

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_ha import HighlyAvailable
from task import evaluate, load_held_out, new_net, use_one_deterministic_thread

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the network over all rounds, from wherever the last leader has stopped."""
    use_one_deterministic_thread()
    config: dict[str, object] = dict(context.run_config)
    min_nodes = int(str(config["min-nodes"]))
    held_out = load_held_out(config)
    net = new_net()

    def evaluate_held_out(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(net, held_out)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    fedavg = FedAvg(
        fraction_evaluate=float(str(config["fraction-evaluate"])),
        min_train_nodes=min_nodes,
        min_evaluate_nodes=min_nodes,
        min_available_nodes=min_nodes,
    )
    HighlyAvailable(fedavg, min_nodes=min_nodes).start(
        grid=grid,
        initial_arrays=ArrayRecord(new_net().state_dict()),
        num_rounds=int(str(config["num-server-rounds"])),
        evaluate_fn=evaluate_held_out,
    )
