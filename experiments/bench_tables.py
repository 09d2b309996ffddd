"""What the benchmark measured, as tables.

Enters: the record that experiments/bench.py writes. Leaves: Markdown.
"""

DISTURBED = 0.1  # share of the processor's time that others may take during a round


def loops_table(result: dict) -> str:
    products, batch = result["matmul_tflops"], result["loops"][0]["batch_size"]
    fastest = " and ".join(f"{rate:.2f} TFLOP/s in {dtype}" for dtype, rate in products.items())
    lines = ["Network|Loop|Images/s|Step, ms|TFLOP/s|Share of the product|Memory, MiB|Images/s ÷ plain's"]
    for case in result["loops"]:
        for name, loop in case["loops"].items():
            network = f"{case['arch']}, {case['image_size']}×{case['image_size']}"
            network += " †" * bool(disturbed(case))
            how = f"ours, {name}{' (auto)' * (name == case['auto'])}"
            how = f"plain, float32, {case['workers']} workers" if name == "plain" else how
            rate = f"{loop['images_per_second']:,.0f}|{loop['ms_per_step']:.1f}|{loop['tflops']:.3f}"
            share = 100 * loop["tflops"] / max(products.values())
            times = f"{loop['ratio']:.2f} ({loop['ratio_low']:.2f} to {loop['ratio_high']:.2f})"
            times = "1" if name == "plain" else times
            lines.append(f"{network}|{how}|{rate}|{share:.0f} %|{loop['peak_mib']:,.0f}|{times}")
    return (
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}; the fastest "
        f"product of two matrices: {fastest}. Batch size {batch}; memory beyond weights and data, without "
        f"that of the workers; (auto): what a run takes by default.\n\n{table(lines)}{footnote(result)}"
    )


def disturbed(case: dict) -> int:
    """How many of the rounds other processes disturbed; of an old record, which does not say it, none."""
    return sum(share > DISTURBED for share in case.get("others_share", []))


def footnote(result: dict) -> str:
    if not any(map(disturbed, result["loops"])):
        return ""
    rounds = len(result["loops"][0]["others_share"])
    told = " and ".join(str(disturbed(case)) for case in result["loops"])
    return (
        f"\n† Not to be relied on: in {told} of {rounds} rounds other processes took more than a tenth of "
        "the processor, also when they were measured again.\n"
    )


def unlearning_text(result: dict) -> str:
    step, first = result["unlearning"], result["loops"][0]
    total = step["sensitivity_seconds"] + step["redrawing_seconds"]
    steps = 1000 * total / first["loops"][first["auto"]]["ms_per_step"]
    return (
        f"Unlearning once, {step['arch']} by {step['images']} images: {total:.2f} s, as long as {steps:.1f} "
        f"steps; mask and redrawing are {step['redrawing_seconds']:.2f} s of it.\n"
    )


def batch_sizes_table(result: dict) -> str:
    lines = [f"{row['batch_size']}|{row['images_per_second']:,.0f}" for row in result["batch_sizes"]]
    return table([f"{result['loops'][0]['arch']}, batch size|Images/s", *lines])


def networks_table(result: dict) -> str:
    lines = ["Unlearning by 64 images|Weights|Sensitivity, s|Memory, MiB|Mask and redrawing, s"]
    lines[0] += "|per million weights, ms|Memory, MiB|per weight, bytes"
    for row in result["networks"]:
        weights, elapsed, memory = (row[k] for k in ("weights", "redrawing_seconds", "redrawing_mib"))
        scoring = f"{row['sensitivity_seconds']:.2f}|{row['sensitivity_mib']:,.0f}"
        redrawing = f"{elapsed:.3f}|{1e9 * elapsed / weights:.1f}"
        held = f"{memory:,.0f}|{memory * 2**20 / weights:.1f}"
        lines.append(f"{row['arch']}|{weights:,}|{scoring}|{redrawing}|{held}")
    return table(lines)


SECTIONS = {
    "loops": loops_table,
    "unlearning": unlearning_text,
    "batch_sizes": batch_sizes_table,
    "networks": networks_table,
}


def markdown(result: dict) -> str:
    return "\n".join(section(result) for name, section in SECTIONS.items() if result[name])


def table(lines: list[str]) -> str:
    lines = [lines[0], "|".join([":---"] + ["---:"] * lines[0].count("|")), *lines[1:]]
    return "".join(f"| {line.replace('|', ' | ')} |\n" for line in lines)
