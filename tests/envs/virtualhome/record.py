"""Records episodes as the published environment plays them, to compare ours with.

    python -m tests.envs.virtualhome.record DATA OUT

Written from the description of the published class on the library's own `to_dict` and
`get_visible_nodes`, with everything in the order of hashes: it shares no code with ours but the
loading of the library and the parsing of commands.
"""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from spa_jax.envs.virtualhome.actions import command, parse
from spa_jax.envs.virtualhome.simulator import library

Json = Any
_GOAL = ("ON", "INSIDE", "HOLDS_RH", "HOLDS_LH")


class Recorder:
    """One episode."""

    def __init__(self, graph: Json, task: Json) -> None:
        edges = graph["edges"]
        for edge in edges:  # the published class removes while it iterates
            inverse = {
                "from_id": edge["to_id"],
                "relation_type": "INSIDE",
                "to_id": edge["from_id"],
            }
            if inverse in edges:
                edges.remove(inverse)
                if edge != inverse:
                    edges.remove(edge)
        environment = library().environment
        home = environment.EnvironmentGraph(graph)
        self.agent = next(n["id"] for n in graph["nodes"] if n["class_name"] == "character")
        self.executor = library().execution.ScriptExecutor(home, {})
        self.state = environment.EnvironmentState(home, {}, instance_selection=True)
        self.task, self.table = task, dict(task["object_id_dict"])

    def _from_agent(self, graph: Json, relation: str) -> list[int]:
        return [
            e["to_id"]
            for e in graph["edges"]
            if e["from_id"] == self.agent and relation in e["relation_type"]
        ]

    def step(self, text: str) -> tuple[str, bool]:
        action, names = parse(text) or ("", ())
        ids: list[int] | None = [self.table[name] for name in names]
        if len(names) == 2:
            graph = self.state.to_dict()
            hands = self._from_agent(graph, "HOLDS")
            held = [
                n["id"] for n in graph["nodes"] if n["id"] in hands and n["class_name"] == names[0]
            ]
            ids = [random.choice(held), self.table[names[1]]] if held else None
        done = False
        if ids is not None:
            objects = " ".join(f"<{n}> ({i})" for n, i in zip(names, ids, strict=True))
            scripts = library().scripts
            line = scripts.parse_script_line(f"[{action}] {objects}", 0)
            done, self.state = self.executor.execute_one_step(scripts.Script([line]), self.state)
        return self._see() if done else "Nothing happens.", self._solved()

    def _see(self) -> str:
        graph = self.state.to_dict()
        seen = library().utils.get_visible_nodes(graph, agent_id=self.agent)["nodes"]
        graph = self.state.to_dict()
        close = [
            e["to_id"]
            for e in graph["edges"]
            if e["from_id"] == self.agent and e["relation_type"] == "CLOSE"
        ]
        names = {n["class_name"] for n in seen if n["id"] in close}
        told = {
            n["id"]: n["class_name"]
            for n in graph["nodes"]
            if n["id"] in close and n["class_name"] in names
        }
        untold = ("CLOSE", "FACING", "INSIDE", "HOLDS_LH", "HOLDS_RH")
        relations = {
            f"{told[e['from_id']]} {e['relation_type']} {told[e['to_id']]}"
            for e in graph["edges"]
            if e["from_id"] in told and e["to_id"] in told and e["relation_type"] not in untold
        }
        things = {
            n["class_name"] + (" is " + " and ".join(n["states"]) if n["states"] else "")
            for n in graph["nodes"]
            if n["class_name"] in names
        }
        hands = self._from_agent(graph, "HOLDS")
        have = [n["class_name"] for n in graph["nodes"] if n["id"] in hands]
        text = ", ".join([*things, *relations])
        text += ". " if text else ""
        return text + (f"You have {', '.join(have)}. " if have else "")

    def _solved(self) -> bool:
        graph, goal = self.state.to_dict(), self.task["revised_graph"]
        states = {n["id"]: set(n["states"]) for n in graph["nodes"]}
        return (
            all(states[n["id"]] == set(n["states"]) for n in goal["nodes"])
            and all(e not in graph["edges"] for e in goal["revised_nodes"])
            and all(e in graph["edges"] for e in goal["revised_add_edges"])
        )


def _prepare(data: Path, scene: int, program: Path) -> tuple[Json, list[Json], Json]:
    """The script, the first and last graph, and the ids, by the library's preparation."""
    utils, scripts = library().utils, library().scripts
    load = lambda name: json.loads((data / "resources" / f"{name}.json").read_text())  # noqa: E731
    utils.load_name_equivalence = lambda: load("class_name_equivalence")
    properties = library().environment.Property
    helper = utils.graph_dict_helper(
        {k: [properties[p] for p in v] for k, v in load("properties_data").items()},
        load("object_script_placing"),
        load("object_states"),
        500,
    )
    names = helper.unity_object2script_object
    script = scripts.read_script(str(program))
    for line in script:
        for parameter in line.parameters:
            parameter.name = names.get(parameter.name, parameter.name)
    text = str(program).replace("withoutconds", "initstate").replace(".txt", ".json")
    renamed = re.sub(r'"(\w+)"', lambda m: f'"{names.get(m[1], m[1])}"', Path(text).read_text())
    conditions = json.loads(renamed)
    graph = json.loads((data / "scenes" / f"TrimmedTestScene{scene}_graph.json").read_text())
    random.seed(0)
    helper.initialize(graph)
    helper.set_to_default_state(graph, None, lambda _: True)
    ids, room, _ = helper.add_missing_object_from_script(script, conditions, graph, {})
    helper.set_to_default_state(graph, room, lambda i: i in ids.values())
    helper.check_binary(graph, lambda _: True, False)
    helper.prepare_from_precondition(conditions, ids, graph)
    helper.open_all_doors(graph)
    helper.ensure_light_on(graph, lambda i: i not in ids.values())
    helper.check_binary(graph, lambda _: True, False)
    home = library().environment.EnvironmentGraph(graph)
    executed, _, graphs = library().execution.ScriptExecutor(home, {}).execute(script)
    assert executed, program
    return script, graphs, ids


def record(data: Path, scene: int, program: Path) -> Json:
    """One case."""
    script, graphs, ids = _prepare(data, scene, program)
    first, last = graphs[0], graphs[-1]
    before = {n["id"]: set(n["states"]) for n in first["nodes"]}
    title, description, *_ = program.read_text().split("\n")
    name = f"s{scene}_{program.stem}"

    def lost(one: Json, other: Json) -> list[Json]:
        return [e for e in one["edges"] if e["relation_type"] in _GOAL and e not in other["edges"]]

    task = {
        "id": name,
        "path": f"{name}.txt",
        "task": title,
        "description": description,
        "revised_graph": {
            "nodes": [
                {k: n[k] for k in ("id", "class_name", "states")}
                for n in last["nodes"]
                if set(n["states"]) != before[n["id"]]
            ],
            "revised_nodes": lost(first, last),
            "revised_add_edges": lost(last, first),
        },
        "object_id_dict": {key[0]: node_id for key, node_id in ids.items()},
    }
    player = Recorder(json.loads(json.dumps(first)), task)
    log = [["", f"The task is {title}({description})."]]
    solved = False
    for line in script:
        text = command(line.action.name, [p.name for p in line.parameters])
        observation, solved = player.step(text)
        log.append([text, f"Observation: {observation}"])
        if solved:
            break
    return {
        "task": task,
        "log": log,
        "success": solved,
        "reward": None,
        "steps": len(log) - 1,
        "reason": "success" if solved else None,
    }


def main(data: Path, out: Path) -> None:
    """Records the programs of the tests' corpus that can be executed, in both scenes."""
    library().utils.random = random
    programs = [
        data / "programs/withoutconds" / f"{key}.txt"
        for key in ("ours/file1_1", "ours/file2_1", "more/file2_1", "more/file3_1")
    ]
    cases = [record(data, scene, program) for program in programs for scene in (1, 2)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "cases_episodes.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
