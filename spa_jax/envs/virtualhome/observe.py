"""What the character sees, in SPA-RL's words.

    chair is CLEAN, computer is CLEAN and ON, television ON tvstand. You have mug.

As published, a class that is seen near the character brings the states of every object of
that class in the home.  The published order is that of hashes; here it is alphabetical.
"""

from spa_jax.envs.virtualhome.simulator import World, states_of

NOTHING_HAPPENS = "Nothing happens."
# Relations that are known; INSIDE, CLOSE, FACING and what is held are not.
_TOLD = ("BETWEEN", "ON", "SITTING")


def visible(world: World) -> set[int]:
    """The ids of what is in the character's room and in nothing closed, all rooms, what is held."""
    nodes = {node.id: node for node in world.nodes()}
    inside: dict[int, list[int]] = {}  # place -> what is in it
    place_of: dict[int, int] = {}  # the last place that the simulator lists counts
    for node_id in nodes:
        for place in world.targets(node_id, "INSIDE"):
            inside.setdefault(place, []).append(node_id)
            place_of[node_id] = place
    seen: set[int] = set()
    waiting = list(inside.get(place_of.get(world.character, -1), ()))
    while waiting:
        node_id = waiting.pop()
        if node_id not in seen:
            seen.add(node_id)
            waiting += inside.get(node_id, ())
    rooms = {node_id for node_id, node in nodes.items() if node.category == "Rooms"}
    open_to_view = {
        node_id
        for node_id in seen
        if place_of[node_id] in rooms or "OPEN" in states_of(nodes[place_of[node_id]])
    }
    return open_to_view | rooms | set(held(world))


def held(world: World) -> list[int]:
    """The ids of what the character has in its hands."""
    hands = [world.targets(world.character, hand) for hand in ("HOLDS_LH", "HOLDS_RH")]
    return [node_id for ids in hands for node_id in ids]


def describe(world: World) -> str:
    """The observation after an action that could be done; empty if nothing is near."""
    near = set(world.targets(world.character, "CLOSE"))
    classes = {world.node(node_id).class_name for node_id in near & visible(world)}
    nodes = world.nodes()
    things = {
        f"{node.class_name} is {' and '.join(states)}" if states else node.class_name
        for node in nodes
        if node.class_name in classes
        for states in (states_of(node),)
    }
    known = {node_id for node_id in near if world.node(node_id).class_name in classes}
    relations = {
        f"{world.node(start).class_name} {relation} {world.node(end).class_name}"
        for start in known
        for relation in _TOLD
        for end in world.targets(start, relation)
        if end in known
    }
    items = [*sorted(things), *sorted(relations)]
    text = f"{', '.join(items)}. " if items else ""
    in_hand = set(held(world))
    if in_hand:
        names = [node.class_name for node in nodes if node.id in in_hand]
        text += f"You have {', '.join(names)}. "
    return text


def introduce(title: str, description: str) -> str:
    """The first observation."""
    return f"The task is {title}({description})."
