"""The plan of a table: which runs it takes and which of their figures it shows, read from one YAML and checked whole.

    title: What each part is for
    recipe: ../planted_llama_npo.yaml
    output_dir: outputs/tables/parts
    seeds: [1, 2, 3]
    rows:
      full: {}
      without_retain: {retain_weight: 0}
    columns:
      - {task: planted, metric: ambiguous}

docs/tables.md describes the keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.eval.matched import Matching
from biasunlearn_trainer.recipe import Recipe, RecipeError, parse_recipe
from biasunlearn_trainer.recipe.keys import nearest, read_yaml

TABLE_KEYS = (
    "title",
    "recipe",
    "recipes",
    "output_dir",
    "seeds",
    "overrides",
    "rows",
    "vary",
    "columns",
    "matched",
    "before",
    "oracle",
)
COLUMN_KEYS = {"task": str, "metric": str, "group": str, "label": str, "change": bool}
ROW_KEYS = ("recipe", "label")
STATES = ("before", "oracle")
SET_BY_GRID = {
    "seed": "list the seeds under `seeds`",
    "output_dir": "every cell has a folder of its own below the table's `output_dir`",
    "overwrite_output_dir": "give --overwrite ROW on the command line",
    "resume_from_checkpoint": "an interrupted cell is continued by itself",
    "dry_run": "give --dry_run on the command line",
}
"""Keys that the grid sets in every cell, and what to do instead of setting them."""
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of every run.

    Attributes:
        task: key of the task in results, `NAME` or `NAME@LABEL`.
        metric: the metric's name.
        group: one group of the task (a bias type); None for the whole.
        label: what stands above the column; None for the names.
        change: show after minus before instead of after.
    """

    task: str
    metric: str
    group: str | None = None
    label: str | None = None
    change: bool = False

    @property
    def name(self) -> str:
        """What the column is called."""
        group = f" {self.group}" if self.group is not None else ""
        return self.label or f"{self.task}: {self.metric}{group}{', change' if self.change else ''}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a recipe and what is set otherwise than in it.

    Attributes:
        name: the folder of its cells.
        label: what stands before the line.
        recipe: path of the recipe.
        overrides: what all rows and this one set, by key.
        origins: where the table sets each of them, for messages.
        of: the label of the row that this one is a variation of; its own where nothing is varied.
        varied: what `vary` sets, by key.
    """

    name: str
    label: str
    recipe: Path
    overrides: Mapping[str, Any]
    origins: Mapping[str, str]
    of: str = ""
    varied: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One run of the grid: a row with a seed.

    Attributes:
        row: its row.
        seed: its seed.
        folder: the run's output folder.
        text: the recipe with everything that the table sets, as YAML.
        recipe: the same, parsed.
    """

    row: Row
    seed: int
    folder: Path
    text: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """ROW/seed-N, as the folders are called."""
        return f"{self.row.name}/seed-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that passed its checks.

    Attributes:
        path: the YAML.
        title: the heading.
        output_dir: holds a folder for every row and the table itself.
        seeds: the seeds of every row, each with the recipe keys that are set with it.
        columns: what is shown.
        matched: how methods are compared at matched forgetting; None where they are not.
        cells: all runs, row by row.
        before: whether to show the figures before unlearning.
        oracle: whether to show the oracle's.
    """

    path: Path
    title: str
    output_dir: Path
    seeds: Mapping[int, Mapping[str, Any]]
    columns: tuple[Column, ...]
    matched: Matching | None
    cells: tuple[Cell, ...]
    before: bool
    oracle: bool

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows in their order."""
        return tuple({cell.row.name: cell.row for cell in self.cells}.values())


def parse_table(path: str | Path) -> Table:
    """Reads and checks a table with the recipe of every cell.

    Args:
        path: the YAML. `recipe` in it is relative to its folder, `output_dir` to the working directory.

    Returns:
        The table. Nothing has been run or written.

    Raises:
        RecipeError: with every fault at once, of the table itself and of every recipe with its overrides.
    """
    path = Path(path)
    entries, faults = read_yaml(path)
    if faults and not entries:
        raise RecipeError(faults, str(path))
    root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    repeated = _repeated([value for _, value in root.value])
    faults += [f"{path}:{line}: `{key}` is set twice in one mapping. Keep one." for line, key in repeated]
    where = {entry.key: entry.where for entry in entries} | _where_rows(path, root)
    reader = _Reader(path, {entry.key: entry.value for entry in entries}, where, faults)
    for key in reader.values:
        if key not in TABLE_KEYS:
            faults.append(f"{reader.where[key]}: unknown key `{key}`{_hint(key, TABLE_KEYS)}.")
    rows, columns, seeds = reader.rows(), reader.columns(), reader.seeds()
    output_dir = Path(reader.text("output_dir", f"outputs/tables/{path.stem}"))
    matched = reader.matched({row.name: row.label for row in rows})
    rows = vary_rows(rows, reader.vary(), reader.where.get("vary", str(path)))
    cells = _parse_cells(rows, seeds or {0: {}}, output_dir, faults)
    table = Table(
        path=path,
        title=reader.text("title", path.stem),
        output_dir=output_dir,
        seeds=seeds,
        columns=columns,
        matched=matched,
        cells=cells,
        **{state: reader.flag(state) for state in STATES},
    )
    if faults:
        raise RecipeError(faults, str(path))
    return table


def vary_rows(rows: list[Row], vary: Mapping[str, list], where: str) -> list[Row]:
    """Each row once for every combination of the varied values; rows as they are where nothing is varied."""
    if not vary:
        return rows
    varied = []
    for row in rows:
        for values in itertools.product(*vary.values()):
            chosen = dict(zip(vary, values, strict=True))
            said = [f"{key} {value}" for key, value in chosen.items()]
            folder = ".".join([row.name, *(re.sub(r"[^A-Za-z0-9._-]", "_", text.replace(" ", "-")) for text in said)])
            overrides, origins = {**row.overrides, **chosen}, {**row.origins, **dict.fromkeys(chosen, where)}
            label = ", ".join([row.label, *said])
            varied.append(Row(folder, label, row.recipe, overrides, origins, of=row.label, varied=chosen))
    return varied


def _parse_cells(
    rows: list[Row], seeds: Mapping[int, Mapping[str, Any]], output_dir: Path, faults: list[str]
) -> tuple[Cell, ...]:
    """Parses every cell's recipe; a fault that all seeds of a row share is said once."""
    cells, said = [], dict.fromkeys(faults)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            entries, row_faults = read_yaml(row.recipe)
            said.update(dict.fromkeys(f"{row.origins['recipe']}: {fault}" for fault in row_faults))
            base = {entry.key: (entry.value, entry.where) for entry in entries}
            for seed, with_it in seeds.items() if not row_faults else ():
                cell_folder = output_dir / row.name / f"seed-{seed}"
                text, origins = _merge(base, row, {"seed": seed, **with_it}, cell_folder)
                draft = Path(folder, "recipe.yaml")
                draft.write_text(text, encoding="utf-8")
                try:
                    cells.append(Cell(row, seed, cell_folder, text, parse_recipe([str(draft)])))
                except RecipeError as err:
                    said.update(dict.fromkeys(_located(fault, draft, row, origins) for fault in err.faults))
    faults[:] = list(said)
    return tuple(cells)


def _merge(base: Mapping[str, tuple], row: Row, of_seed: Mapping[str, Any], folder: Path) -> tuple[str, list[str]]:
    """The recipe of a cell, a key a line, and where each line comes from."""
    own = {key: (value, row.origins[key]) for key, value in row.overrides.items()}
    grid = {key: (value, "seeds") for key, value in of_seed.items()} | {"output_dir": (str(folder), "output_dir")}
    merged = {**{k: v for k, v in base.items() if k not in SET_BY_GRID}, **own, **grid}
    lines = [f"{key}: {_flow(value)}" for key, (value, _) in merged.items()]
    origins = [origin for line, (_, origin) in zip(lines, merged.values(), strict=True) for _ in line.splitlines()]
    return "\n".join(lines) + "\n", origins


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("\n...")


def _located(fault: str, draft: Path, row: Row, origins: list[str]) -> str:
    """Names the line of the table or of the recipe in place of the one in the merged draft."""
    line = re.match(rf"{re.escape(str(draft))}:(\d+): (.*)", fault, flags=re.S)
    if line:
        return f"{origins[int(line[1]) - 1]}: {line[2]}"
    return fault.replace(str(draft), f"{row.origins['recipe']}, {row.recipe.name}")


@dataclasses.dataclass
class _Reader:
    """Takes the values of a table out of its YAML and gathers what is wrong with them."""

    path: Path
    values: Mapping[str, Any]
    where: Mapping[str, str]
    faults: list[str]

    def _get(self, key: str, default: Any, kind: type, words: str) -> Any:
        value = self.values.get(key, default)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        self.faults.append(f"{self.where[key]}: `{key}` is {value!r}, expected {words}.")
        return default

    def text(self, key: str, default: str) -> str:
        return self._get(key, default, str, "text")

    def flag(self, key: str) -> bool:
        return self._get(key, False, bool, "true or false")

    def seeds(self) -> dict[int, dict[str, Any]]:
        seeds = self.values.get("seeds")
        if seeds is None:
            self.faults.append(f"{self.path}: `seeds` is missing. List them: `seeds: [1, 2, 3]`.")
            return {}
        listed = list(seeds) if isinstance(seeds, list | dict) else []
        are_counts = listed and all(type(seed) is int and seed >= 0 for seed in listed)
        if not are_counts or len(set(listed)) < len(listed):
            self.faults.append(
                f"{self.where['seeds']}: `seeds` is {seeds!r}, expected a list of different counts, or a mapping of "
                "counts to the recipe keys that are set with each."
            )
            return {}
        with_them = seeds if isinstance(seeds, dict) else {seed: {} for seed in listed}
        for seed, keys in with_them.items():
            if not isinstance(keys, dict):
                self.faults.append(f"{self.where['seeds']}: seed {seed} is {keys!r}, expected recipe keys.")
                return {}
            self._overrides(keys, "seeds", self.where["seeds"])
        return {seed: dict(keys) for seed, keys in with_them.items()}

    def vary(self) -> dict[str, list]:
        vary = self._get("vary", {}, dict, "a mapping of recipe keys to the list of values of each")
        for key, values in vary.items():
            if not isinstance(values, list) or not values or len({str(value) for value in values}) < len(values):
                self.faults.append(f"{self.where['vary']}: `{key}` is {values!r}, expected a list of different values.")
                return {}
        self._overrides(vary, "vary", self.where.get("vary", ""))
        return {key: values for key, values in vary.items() if key not in SET_BY_GRID}

    def matched(self, rows: Mapping[str, str]) -> Matching | None:
        given = self.values.get("matched")
        if given is None:
            return None
        try:
            matching = Matching.of(given)
            if matching.against is not None and matching.against not in rows:
                raise ValueError(f"`against` is {matching.against!r}{_hint(str(matching.against), rows)}.")
            return dataclasses.replace(matching, against=rows.get(matching.against))
        except ValueError as err:
            self.faults += [f"{self.where['matched']}: matched: {line}" for line in str(err).splitlines()]
            return None

    def columns(self) -> tuple[Column, ...]:
        given = self.values.get("columns")
        if not isinstance(given, list) or not given:
            at = self.where.get("columns", self.path)
            self.faults.append(f"{at}: `columns` must be a list with at least one `{{task: ..., metric: ...}}`.")
            return ()
        columns = [column for number, value in enumerate(given, 1) if (column := self._column(number, value))]
        names = [column.name for column in columns]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self.faults.append(f"{self.where['columns']}: two columns are called {name!r}. Give one another `label`.")
        return tuple(columns)

    def _column(self, number: int, value: Any) -> Column | None:
        at = f"{self.where['columns']}: column {number}"
        if not isinstance(value, dict):
            self.faults.append(f"{at}: expected `{{task: ..., metric: ...}}`, got {value!r}.")
            return None
        unknown = [str(key) for key in value if key not in COLUMN_KEYS]
        faults = [f"{at}: unknown key `{key}`{_hint(key, COLUMN_KEYS)}." for key in unknown]
        faults += [f"{at}: `{key}` is missing." for key in ("task", "metric") if key not in value]
        for key, kind in COLUMN_KEYS.items():
            if key in value and not isinstance(value[key], kind):
                expected = "text" if kind is str else "true or false"
                faults.append(f"{at}: `{key}` is {value[key]!r}, expected {expected}.")
        self.faults += faults
        return None if faults else Column(**value)

    def rows(self) -> list[Row]:
        named = self._get("rows", {}, dict, "a mapping of row names to what each sets")
        listed = self._get("recipes", [], list, "a list of recipe paths")
        if not named and not listed:
            self.faults.append(f"{self.path}: no rows. Name them under `rows`, or list `recipes`.")
        shared = self._get("overrides", {}, dict, "a mapping of recipe keys")
        shared = self._overrides(shared, "overrides", self.where.get("overrides", ""))
        rows = []
        for recipe in listed:
            if isinstance(recipe, str):
                rows.append(self._row(Path(recipe).stem, {"recipe": recipe}, "recipes", shared))
            else:
                self.faults.append(f"{self.where['recipes']}: a recipe is {recipe!r}, expected a path.")
        rows += [self._row(name, given, "rows", shared) for name, given in named.items()]
        rows = [row for row in rows if row]
        names = [row.name for row in rows]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self.faults.append(f"{self.where['recipes']}: two rows are called `{name}`. Put one of them under `rows`.")
        return rows

    def _row(self, name: Any, given: Any, section: str, shared: Mapping[str, tuple]) -> Row | None:
        at = f"{self.where.get(f'rows.{name}' if section == 'rows' else section, self.path)}: row `{name}`"
        given = {} if given is None else given
        if isinstance(name, bool) or not SAFE_NAME.fullmatch(str(name)) or str(name) in STATES:
            self.faults.append(
                f"{at}: a row's name is a folder's name: letters, digits, `.`, `_` and `-`, not `before` or `oracle`. "
                "Write what readers should see as its `label`."
            )
            return None
        if not isinstance(given, dict):
            self.faults.append(f"{at}: expected a mapping of recipe keys, got {given!r}.")
            return None
        recipe, label = given.get("recipe", self.values.get("recipe")), given.get("label", str(name))
        for key, value in (("recipe", recipe), ("label", label)):
            if not isinstance(value, str):
                got = "missing" if value is None else f"{value!r}, expected text"
                self.faults.append(f"{at}: `{key}` is {got}. Set it here or for all rows.")
        if not isinstance(recipe, str) or not isinstance(label, str):
            return None
        own = {key: value for key, value in given.items() if key not in ROW_KEYS}
        merged = {**shared, **self._overrides(own, section, at)}
        origins = {key: origin for key, (_, origin) in merged.items()}
        overrides = {key: value for key, (value, _) in merged.items()}
        return Row(str(name), label, self.path.parent / recipe, overrides, {**origins, "recipe": at}, of=label)

    def _overrides(self, given: Mapping[Any, Any], section: str, at: str) -> dict[str, tuple[Any, str]]:
        """Recipe keys with where they are set; those that the grid itself sets are faults."""
        for key in SET_BY_GRID.keys() & given.keys():
            self.faults.append(f"{at}: `{key}` cannot be set in a table: {SET_BY_GRID[key]}.")
        at = f"{at}: {section}" if section == "overrides" else at
        return {str(key): (value, at) for key, value in given.items() if key not in SET_BY_GRID}


def _hint(key: str, keys: Any) -> str:
    return nearest(key, keys) or f"; there are {', '.join(keys)}"


def _where_rows(path: Path, root: yaml.MappingNode) -> dict[str, str]:
    """FILE:LINE of every row, as `rows.NAME`."""
    sections = [value for key, value in root.value if key.value == "rows" and isinstance(value, yaml.MappingNode)]
    return {f"rows.{k.value}": f"{path}:{k.start_mark.line + 1}" for section in sections for k, _ in section.value}


def _repeated(nodes: list[yaml.Node]) -> Iterator[tuple[int, str]]:
    """Line and name of keys that one mapping sets twice; PyYAML silently takes the last."""
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    yield key.start_mark.line + 1, key.value
                seen.add(key.value)
            yield from _repeated([value for _, value in node.value])
        elif isinstance(node, yaml.SequenceNode):
            yield from _repeated(node.value)
