"""benchmarks/results/*.json -> the tables of the README, each between its two markers.

    python benchmarks/report.py            writes it into README.md
    python benchmarks/report.py --print    shows it
"""
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
MARKER, TPU, DECODING, PROFILE = "<!-- benchmarks -->", "<!-- compiled for TPUs -->", "<!-- decoding on TPUs -->", "<!-- where a token's time goes -->"
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ("train_step", "decode", "serve", "serve_int8", "data")


def results(folder: pathlib.Path = ROOT / "benchmarks" / "results") -> list[dict]:
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    found = [r for r in found if "rows" in r]                        # families.json makes docs/families.md
    return sorted(found, key=lambda r: ("device" in r["hardware"], ORDER.index(r["benchmark"]) if r["benchmark"] in ORDER else len(ORDER)))


def machine(result: dict) -> str:
    hardware = result["hardware"]
    return (f"{hardware['device']}, " if "device" in hardware else "") + f"{hardware['cpu']}, {hardware['cores']} cores"


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def line(row: dict, result: dict) -> str:
    """what | llmjax | the others | ratio"""
    def told(name: str, value: float) -> str:
        mfu = result.get("mfu", {}).get(name)
        return amount(value, row["unit"]) + (f", MFU {mfu:.0%}" if mfu else "")
    ours = [f"{told(name, v)} ({name.removeprefix('llmjax').lstrip(', ')})".replace(" ()", "") for name, v in row["sides"].items() if name.startswith("llmjax")]
    theirs = [f"{told(name, v)} ({name})" for name, v in row["sides"].items() if not name.startswith("llmjax")]
    return f"| {row['what']} | {'; '.join(ours)} | {'; '.join(theirs)} | {row['ratio']:.2f} × |"


def table(found: list[dict]) -> str:
    if not found:
        return "`benchmarks/results/` holds no measurements yet."
    lines = []
    for place in dict.fromkeys(machine(r) for r in found):
        here = [r for r in found if machine(r) == place]
        versions = {name: v for r in here for name, v in r["versions"].items()}
        lines += [f"On {place} ({', '.join(f'{name} {v}' for name, v in versions.items())}):", "", "| work | llmjax | peer | llmjax / best peer |", "|---|---|---|---|",
                  *[line(row, r) for r in here for row in r["rows"]], ""]
    return "\n".join(lines).rstrip()


def compiled(rows: list[dict]) -> str:
    """What tpu_compile.py measured."""
    lines = ["| full remat | HBM GB (MaxText) | sends GB (MaxText) | Mcycles (MaxText) |", "|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['error'][:120]} | | |")
            continue
        cells = [f"{row[k]:,.1f}" + (f" ({row['maxtext_' + k]:,.1f})" if f"maxtext_{k}" in row else "") for k in ("hbm_gb", "sent_gb", "mcycles")]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def decoding(rows: list[dict]) -> str:
    """What tpu_decode.py measured."""
    lines = ["| 8 chips, tensor parallel | weights | rows × positions | HBM GB | temporaries MB | largest gather | cache aliased | Mcycles (bound) |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        names = {"decode": "decode_step, contiguous cache", "serve": "the server's step, pages"}
        lines.append(f"| {row['chip']}: {names[row['what']]} | {row['weights']} | {row['rows']} × {row['length']:,} | {row['hbm_gb']:.2f} | {row['temp_mb']:,.0f} | "
                     f"{row['gathered_bytes'] / 1e3:,.1f} kB | {'yes' if row['donated'] else 'NO'} | {row['mcycles']:.1f} ({row['bound_mcycles']:.1f}) |")
    return "\n".join(lines)


def spent(result: dict) -> str:
    """What decode_profile.py measured."""
    tokens = result["tokens"]
    lines = [f"| milliseconds of a token, {machine(result)} | {' | '.join(t['weights'] for t in tokens)} |", "|---|" + "---|" * len(tokens)]
    lines += [f"| {part} | {' | '.join(format(t['parts'][part], '.2f') for t in tokens)} |" for part in tokens[0]["parts"]]
    return "\n".join([*lines, f"| all | {' | '.join(format(t['milliseconds'], '.2f') for t in tokens)} |", f"| weights read, MB | {' | '.join(str(t['read_MB']) for t in tokens)} |"])


def put(text: str, made: str, marker: str = MARKER) -> str:
    """README text with `made` between its two markers. Raises ValueError where there are not two."""
    parts = text.split(marker)
    if len(parts) != 3:
        raise ValueError(f"README.md: {marker} is wanted twice, it is there {len(parts) - 1} times")
    return f"{parts[0]}{marker}\n{made}\n{marker}{parts[2]}"


def tables(text: str) -> str:
    """README text with all its tables."""
    text = put(put(text, table(results())), compiled(json.loads((RESULTS / "tpu_compile.json").read_text())["cases"]), TPU)
    text = put(text, spent(json.loads((RESULTS / "decode_profile.json").read_text())), PROFILE)
    return put(text, decoding(json.loads((RESULTS / "tpu_decode.json").read_text())["cases"]), DECODING)


def main() -> None:
    readme = ROOT / "README.md"
    if "--print" in sys.argv[1:]:
        print(table(results()))
        return
    readme.write_text(tables(readme.read_text()))


if __name__ == "__main__":
    main()
