"""`report.html` and the page of a comparison, as a browser reads them."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from test_report import CONTROL, EXPORTS, OTHERS, REPORT, ROOT, SEARCH, changed

from ddnp_jax.__main__ import main
from ddnp_jax.pipeline import report
from ddnp_jax.pipeline.report import figures, page, pareto, text
from ddnp_jax.pipeline.report.blocks import Paragraph, Picture, Section

CHROMIUM = shutil.which("chromium") or shutil.which("/usr/bin/chromium")
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '"><script>alert(1)</script>'


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict
    children: list = dataclasses.field(default_factory=list)

    def all(self, *tags):
        """The elements below this one that have one of the tags, in order."""
        below = [each for child in self.children if isinstance(child, Element) for each in child.itself_and_all()]
        return [each for each in below if not tags or each.tag in tags]

    def itself_and_all(self):
        return [self, *self.all()]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children).strip()


class Page(html.parser.HTMLParser):
    """The tree of a page; fails if an element is not closed, or another one is closed."""

    def __init__(self, content):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.declarations = []
        self.feed(content)
        self.close()
        assert self.open == [self.root], f"not closed: {[each.tag for each in self.open[1:]]}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        self.open[-1].children.append(element := Element(tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Element(tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def handle_decl(self, declaration):
        self.declarations.append(declaration)

    def all(self, *tags):
        return self.root.all(*tags)

    def one(self, tag):
        (found,) = self.all(tag)
        return found

    def tables(self):
        """The cells of every table, by its label."""
        regions = [each for each in self.all("div") if each.all("table")]
        return {
            each.attributes["aria-label"]: [[cell.text for cell in row.all("th", "td")] for row in each.all("tr")]
            for each in regions
        }

    def section(self, heading):
        (found,) = (each for each in self.all("section") if [h.text for h in each.all("h2")] == [heading])
        return found


def written(folder, what, log=SEARCH):
    """The page of a run."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    report.write(folder, what)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of a run that has everything."""
    what = changed(**CONTROL, exports=EXPORTS, other_latencies=OTHERS)
    return written(tmp_path_factory.mktemp("full"), what)


def check_that_it_needs_nothing_else(found):
    """Checks that there are no scripts or addresses of other files, and that every referenced name exists once."""
    assert found.declarations == ["DOCTYPE html"]
    assert not found.all("script", "link", "img", "image", "iframe", "object", "embed", "base", "form")
    elements = found.all()
    values = [
        (name, value) for each in elements for name, value in each.attributes.items() if not name.startswith("xmlns")
    ]
    assert not [pair for pair in values if re.search(r"https?:|//", pair[1] or "")]
    assert not [name for name, _ in values if name in ("src", "srcset", "data") or name.startswith("on")]
    assert not any(re.search(r"@import|url\(|//", style.text) for style in found.all("style"))
    names = [value for name, value in values if name == "id"]
    assert len(set(names)) == len(names)
    links = [value.removeprefix("#") for name, value in values if name in ("href", "xlink:href")]
    clips = [clip for _, value in values for clip in re.findall(r"url\(#([^)]*)\)", value or "")]
    assert {*links, *clips} <= {*names} and links and clips


def test_a_page_says_what_the_run_has_shown(full):
    assert full.one("html").attributes == {"lang": "en"}
    assert full.one("title").text == full.one("h1").text == "ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5"
    (lead,) = (each for each in full.all("p") if each.attributes.get("class") == "lead")
    assert lead.text == text.headline(changed(**CONTROL))
    assert [[each.text for each in box.all("dt", "dd")] for box in full.one("dl").all("div")] == [
        ["Top-1 accuracy", "91.50 %", "-0.75 points against the base, fine-tuned in the same way"],
        ["FLOPs", "21.000 M", "-47.50 %", "40.000 M before"],
        ["Measured latency", "60.00 ms", "-25.00 %", "80.00 ms before", "batch 128"],
        [
            *("Parameters", "0.136 M", "-50.00 %", "0.272 M before"),
            *("197,102 bytes as onnx_int8", "568,652 bytes as stablehlo"),
        ],
    ]
    assert [each.text for each in full.all("h2")] == [
        *("Speed", "Exported files", "Search", "Budget", "How the figures were taken", "Notes", "Stages"),
        "Channels per gate",
    ]
    assert [each.text for each in full.section("Notes").all("li")] == ["fine-tuning shortened: 5 epochs"]


def test_the_tables_of_a_page(full):
    tables = full.tables()
    assert tables["ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5"] == [
        ["network", "top-1 (%)", "top-5 (%)", "FLOPs", "parameters", "latency (ms)"],
        ["base", "92.00", "99.75", "40.000 M", "0.272 M", "80.00"],
        ["base, fine-tuned in the same way", "92.25", "99.50", "40.000 M", "0.272 M", "80.00"],
        ["pruned, before fine-tuning", "61.25", "95.50", "21.000 M", "0.136 M", "60.00"],
        ["pruned, after fine-tuning", "91.50", "99.88", "21.000 M", "0.136 M", "60.00"],
        ["change, both fine-tuned", "-0.75", "+0.38", "-47.50 %", "-50.00 %", "-25.00 %"],
    ]
    assert tables["Speed"][2] == ["XLA", "128", "80.00", "60.00", "1.33", "1.90", "0.70"]
    assert tables["Exported files"][1] == ["export/network_int8.onnx", "197,102", "3.1e-02", "98.44", "91.38"]
    assert [each.text for each in full.section("Exported files").all("code")] == [
        "export/network_int8.onnx",
        "export/network.stablehlo",
    ]
    assert tables["Stages"][-1] == ["all", "", "", "", "", "1,385"]
    assert tables["Channels per gate"][1:] == [
        ["layer1_0/conv1", "16", "10", "62.5"],
        ["layer2_0/conv1", "32", "12", "37.5"],
        ["all", "48", "22", "45.8"],
    ]
    gates = full.section("Channels per gate")
    assert [[cell.text for cell in foot.all("th", "td")] for foot in gates.all("tfoot")] == [
        ["all", "48", "22", "45.8"]
    ]
    cells = gates.all("td")
    assert {cell.attributes["class"] for cell in cells} == {"number"}
    assert [each.attributes["scope"] for each in gates.all("th")] == ["col"] * 4 + ["row"] * 3


def test_a_page_needs_nothing_beside_itself(full):
    check_that_it_needs_nothing_else(full)
    (policy,) = (each.attributes["content"] for each in full.all("meta") if "http-equiv" in each.attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_plots_are_in_the_page_and_have_names(full):
    drawings = full.all("svg")
    assert [(each.attributes["role"], each.attributes["aria-label"]) for each in drawings] == [
        ("img", "Channels per gate, before and after"),
        ("img", "Accuracy and cost over the search"),
    ]
    assert [each.text for each in full.all("figcaption")] == [each.attributes["aria-label"] for each in drawings]
    labels = [[each.text for each in drawing.all("text")] for drawing in drawings]
    assert {"layer1_0/conv1", "layer2_0/conv1", "10", "12", "before", "after"} <= {*labels[0]}
    assert {"target, p = 0.5", "top-1 accuracy (%)", "remaining cost", "search step"} <= {*labels[1]}
    styles = " ".join(each.attributes.get("style", "") for drawing in drawings for each in drawing.all())
    assert not re.search("#000000|#0072b2|#e5e5e5", styles, re.IGNORECASE)  # these differ on a dark background
    used = {*re.findall(r"var\((--[\w-]+)\)", styles)}
    assert used == {"--blue", "--light-blue", "--grid"}
    light, dark = full.all("style")[0].text.split("@media screen and (prefers-color-scheme: dark)")
    assert all(f"{name}: #" in light and f"{name}: #" in dark for name in used)


def test_what_must_not_be_overlooked_is_a_warning(tmp_path):
    far = "The search has not converged: k and its gate differ. What helps: more steps."
    found = written(tmp_path, changed(notes=(far,)))
    warnings = [each for each in found.all("p") if each.attributes.get("class") == "warning"]
    assert [each.text.partition(".")[0] for each in warnings] == [
        "The search has not converged: k and its gate differ",
        "The pruned network was fine-tuned and the base was not, so part of the change may come"
        " from additional training, "
        "or from other images (see Stages)",
    ]
    assert [each.text for each in warnings[0].all("strong")] == ["The search has not converged"]
    assert [each.text for each in warnings[1].all("code")] == ["finetune.control=True"]


def test_markdown_and_page_say_the_same(full, tmp_path):
    report.write(tmp_path, changed(**CONTROL, exports=EXPORTS, other_latencies=OTHERS))
    lines = [line for line in (tmp_path / "report.md").read_text().splitlines() if line and "metrics.jsonl" not in line]
    sentences = [re.sub(r"^(- |#+ )|[`*]", "", line) for line in lines if line[0] not in "|!"]
    assert len(sentences) > 15
    shown = {each.text for each in full.all("h1", "h2", "p", "li")}
    assert [sentence for sentence in sentences if sentence not in shown] == []


def test_names_that_are_html_are_shown_as_they_are(tmp_path):
    what = changed(
        model=HOSTILE,
        dataset=r"$\frac & <b>",
        gate_names=("<img src=x onerror=alert(1)>", "$a</svg>"),
        notes=("</section> & **`<i>`**",),
        exports={HOSTILE: EXPORTS["stablehlo"]},
    )
    found = written(tmp_path, what)
    check_that_it_needs_nothing_else(found)
    assert not found.all("b", "i")
    assert found.one("title").text == rf"ddnp, {HOSTILE} on $\frac & <b>, p = 0.5"
    assert [row[0] for row in found.tables()["Channels per gate"][1:3]] == [*what.gate_names]
    assert {*what.gate_names} <= {each.text for each in found.all("svg")[0].all("text")}
    assert [each.text for each in found.section("Notes").all("li")] == ["</section> & `<i>`"]


@pytest.mark.parametrize("run", ["digits_r20", "cifar10_r56/ddnp", "cifar10_r56/magnitude", "cifar10_r56_half/dg-1"])
def test_reports_of_older_versions_have_a_page(run, tmp_path):
    old = report.read(ROOT / "results" / run / "report.json")
    found = written(tmp_path, old, log=())
    check_that_it_needs_nothing_else(found)
    assert found.one("h1").text == old.title
    assert len(found.tables()["Channels per gate"]) == len(old.widths) + 2


def test_a_plot_that_was_not_drawn_is_an_error():
    with pytest.raises(KeyError, match="widths"):
        page.document("title", "lead", [Section("", [Picture("widths", "caption")])], {})


def test_bold_and_code_do_not_cross():
    found = Page(page.document("title", "**a `b** c `d`", [Section("", [Paragraph("`**`")])], {}))
    lead, paragraph = found.all("p")
    assert (lead.text, [each.text for each in lead.all("code")]) == ("a `b c d", ["d"])
    assert (paragraph.text, [each.tag for each in paragraph.all()]) == ("**", ["code"])


SEEDS = [
    changed(seed=0, pruned_top1=91.0),
    changed(seed=1, pruned_top1=92.0, latency_ms=report.Latency(batch=128, before=80.0, after=64.0)),
]
OTHER = changed(method="magnitude", variant="magnitude", pruned_top1=90.0, flops_total_after=24_000_000)


def test_comparison_has_the_table_and_the_plots():
    found = Page(report.comparison_html([*SEEDS, OTHER]))
    check_that_it_needs_nothing_else(found)
    assert found.one("title").text == found.one("h1").text == "Comparison of pruned networks"
    assert found.all("p")[0].text == (
        "3 runs, all with model resnet20, data set CIFAR-10 (JPEG), p 0.5, FLOPs as macs, fine-tuning epochs 5."
    )
    assert found.tables() == {
        "Comparison of pruned networks": [
            [
                *("method", "seeds", "FLOPs removed (%)", "parameters removed (%)", "base top-1 (%)"),
                *("before fine-tuning", "after fine-tuning", "change", "seconds"),
            ],
            [
                *("ddnp", "2", "47.50 ± 0.00", "50.00 ± 0.00", "92.00 ± 0.00", "61.25 ± 0.00", "91.50 ± 0.71"),
                *("-0.50 ± 0.71", "1295 ± 0"),
            ],
            ["magnitude", "1", "40.00", "50.00", "92.00", "61.25", "90.00", "-2.00", "1295"],
        ]
    }
    section = found.section("Accuracy and cost, resnet20 on CIFAR-10 (JPEG)")
    assert [each.attributes["aria-label"] for each in section.all("svg")] == [
        "Top-1 accuracy against the kept fraction of the FLOPs",
        "Top-1 accuracy against the kept fraction of the latency of a batch of 128 on 1 x cpu",
    ]
    for drawing in section.all("svg"):
        assert {"ddnp", "magnitude", "base"} <= {each.text for each in drawing.all("text")}


def test_comparison_of_one_run_and_of_names_that_are_html():
    found = Page(report.comparison_html([changed(variant=HOSTILE, dataset="<b>")]))
    check_that_it_needs_nothing_else(found)
    assert found.all("p")[0].text.startswith("1 run, all with model resnet20, data set <b>, p 0.5")
    assert found.tables()["Comparison of pruned networks"][1][0] == f"ddnp ({HOSTILE})"
    assert not found.all("b")


def test_comparison_refuses_the_same_seed_twice():
    with pytest.raises(ValueError, match="Two reports of ddnp on resnet20"):
        report.comparison_html([REPORT, REPORT])


def test_networks_and_data_sets_are_compared_with_their_own():
    others = [changed(dataset="digits"), changed(model="resnet56"), changed(flops_convention="authors")]
    found = Page(report.comparison_html([REPORT, *others]))
    check_that_it_needs_nothing_else(found)
    assert [each.text.removeprefix("Accuracy and cost, ") for each in found.all("h2")] == [
        "resnet20 on CIFAR-10 (JPEG)",
        "resnet20 on digits",
        "resnet56 on CIFAR-10 (JPEG)",
        "resnet20 on CIFAR-10 (JPEG)",
    ]
    assert [len(each.all("svg")) for each in found.all("section")] == [0, 2, 2, 2, 2]


@pytest.mark.parametrize("form", ["", "with-a-long-name-"])
def test_the_legend_is_within_the_figure(form):
    names = ("magnitude", "bn_scale", *"abcdefghi")
    lines = [[changed(method=name, variant=f"{form}{i:x}" if form else name)] for i, name in enumerate(names)]
    for plot in pareto.plots(lines, pareto.styles(runs[0].method_name for runs in lines)):
        canvas = FigureCanvasAgg(plot.figure)
        canvas.draw()
        (legend,) = plot.figure.legends
        box, whole = legend.get_window_extent(), plot.figure.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == (2 if form else 4)


@pytest.mark.parametrize(
    ("variants", "labels"),
    [(("62,ddnp", "62,cc"), ["ddnp", "cc"]), (("62,ddnp", "cc"), ["ddnp (62)", "cc"])],
)
def test_the_legend_leaves_out_the_form_that_all_methods_have(variants, labels):
    lines = [[changed(method=name, variant=each)] for name, each in zip(("ddnp", "cc"), variants, strict=True)]
    for plot in pareto.plots(lines, pareto.styles(runs[0].method_name for runs in lines)):
        (legend,) = plot.figure.legends
        assert {*labels} <= {text.get_text() for text in legend.get_texts()}


@pytest.mark.parametrize(
    ("variant", "name"),
    [("default", "ddnp"), ("ddnp", "ddnp"), ("authors", "ddnp (authors)"), ("62,ddnp", "ddnp (62)")],
)
def test_the_name_of_a_method(variant, name):
    assert changed(variant=variant).method_name == name


def drawn(lines):
    """The points of every method with their deviations, the bases, and the line, of each plot."""
    styles = pareto.styles(runs[0].method_name for runs in lines)
    for plot in pareto.plots(lines, styles):
        (axes,) = plot.figure.axes
        methods = {each.get_label(): list(zip(*each.lines[0].get_data(), strict=True)) for each in axes.containers}
        stars = {
            line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
            for line in axes.lines
            if line.get_marker() == "*"
        }
        (best,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
        yield methods, stars, list(map(tuple, zip(*best.get_data(), strict=True)))


def test_points_of_the_plots():
    control = [changed(**CONTROL | {"seed": each.seed}) for each in SEEDS]
    flops, latency = drawn([SEEDS, [OTHER]])
    assert flops == (
        {"ddnp": [(pytest.approx(52.5), 91.5)], "magnitude": [(pytest.approx(60.0), 90.0)]},
        {"base": (100.0, 92.0)},
        [(pytest.approx(52.5), 91.5), (100.0, 92.0)],
    )
    assert latency == (
        {"ddnp": [(pytest.approx(77.5), 91.5)], "magnitude": [(pytest.approx(75.0), 90.0)]},
        {"base": (100.0, 92.0)},
        [(pytest.approx(75.0), 90.0), (pytest.approx(77.5), 91.5), (100.0, 92.0)],
    )
    (_, stars, best), _ = drawn([control])
    assert stars == {"base": (100.0, 92.0), "base, fine-tuned in the same way": (100.0, 92.25)}
    assert best[-1] == (100.0, 92.25)


def test_latencies_are_compared_on_one_device_alone():
    elsewhere = dataclasses.replace(OTHER, devices="8 x H100")
    plots = list(pareto.plots([SEEDS, [elsewhere]], pareto.styles(["ddnp", "magnitude"])))
    assert [plot.caption.partition("kept fraction of the ")[2] for plot in plots] == [
        "FLOPs",
        "latency of a batch of 128 on 1 x cpu",
        "latency of a batch of 128 on one of 8 x H100",
    ]
    assert [len(plot.figure.axes[0].containers) for plot in plots] == [2, 1, 1]


def test_front():
    points = [(50, 90), (50, 91), (60, 89), (70, 91), (80, 92), (100, 95), (100, 94)]
    assert pareto.front(points) == [(50, 91), (80, 92), (100, 95)]
    assert pareto.front(reversed(points)) == pareto.front(points)


def test_methods_look_different_from_each_other_and_from_the_base():
    names = [f"method {number}" for number in range(42)]
    styles = pareto.styles(names * 2)
    assert list(styles) == names
    assert len(set(styles.values())) == 42
    assert len({color for color, _ in list(styles.values())[:6]}) == 6
    assert len({marker for _, marker in list(styles.values())[:7]}) == 7
    assert not {(color, marker) for color, marker in styles.values() if color == figures.TEXT or marker == "*"}


def test_the_command_writes_the_page_that_is_asked_for(tmp_path, capsys):
    report.write(tmp_path, REPORT)
    target = tmp_path / "table.html"
    main(["compare", str(tmp_path / "report.json"), f"--html={target}"])
    assert capsys.readouterr().out == report.compare([REPORT]) + "\n"
    assert target.read_text(encoding="utf-8") == report.comparison_html([REPORT])
    with pytest.raises(SystemExit, match=r"^error: the following arguments are required: RUN$"):
        main(["compare", f"--html={target}"])


def browse(folder, path, *options):
    """The page's tree as Chromium renders and prints it."""
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"),
    )
    command = [CHROMIUM, *flags, *options, Path(path).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_page(tmp_path):
    written(tmp_path, changed(**CONTROL))
    shown = Page(browse(tmp_path, tmp_path / "report.html", "--dump-dom"))
    assert shown.one("h1").text == "ddnp, resnet20 on CIFAR-10 (JPEG), p = 0.5"
    assert len(shown.all("svg")) == 2
    assert len(shown.tables()["Channels per gate"]) == 4
    for width, dark in ((1000, False), (400, False), (400, True)):
        picture = tmp_path / "shot.png"
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        options = (f"--screenshot={picture}", f"--window-size={width},1600", "--hide-scrollbars", scheme)
        browse(tmp_path, tmp_path / "report.html", *options)
        with Image.open(picture) as image:
            pixels = image.convert("RGB")
        assert pixels.width == width
        assert pixels.getpixel((2, 2)) == ((20, 23, 27) if dark else (255, 255, 255))
        colors = {color for count, color in pixels.getcolors(pixels.width * pixels.height) if count > 500}
        assert ((59, 147, 214) if dark else (0, 114, 178)) in colors  # the bars
