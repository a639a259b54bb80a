//! Draws measured figures as SVG: microseconds and logical GB/s over tokens, one pair of pictures for each setting.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use plotters::prelude::*;

use crate::row::Row;

/// Panels from left to right; an operation that was not measured has none.
const OPERATIONS: [&str; 8] = [
    "dispatch",
    "dispatch_split",
    "combine",
    "combine_staged",
    "pair",
    "pair_staged",
    "pair_graph",
    "pair_staged_graph",
];

const PANEL: (u32, u32) = (400, 400);
const TITLE: u32 = 34;
const LEGEND_LINE: u32 = 24;
const LEGEND_ENTRY: u32 = 300;
const FONT: &str = "sans-serif";

/// Pictures stand on a ground of their own, so that they read the same on light and dark pages.
const GROUND: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x20, 0x24, 0x2a);
const GRID: RGBColor = RGBColor(0xd8, 0xdc, 0xe2);
/// All at least 3:1 against the ground; beyond these, a colour comes again.
const COLOURS: [RGBColor; 10] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x5f, 0x00),
    RGBColor(0x2c, 0x8f, 0x2c),
    RGBColor(0xc8, 0x25, 0x2b),
    RGBColor(0x7d, 0x55, 0xb5),
    RGBColor(0x8c, 0x56, 0x4b),
    RGBColor(0xc4, 0x4f, 0xa5),
    RGBColor(0x6b, 0x6f, 0x76),
    RGBColor(0x8a, 0x8b, 0x12),
    RGBColor(0x0f, 0x8c, 0x9c),
];

/// What a picture is of: everything but tokens, operation, and who did it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Setting<'a> {
    device: &'a str,
    mode: &'a str,
    ranks: usize,
    hidden: usize,
    dtype: &'a str,
    experts: usize,
    topk: usize,
    routing: &'a str,
    cache: &'a str,
    scope: &'a str,
}

impl<'a> Setting<'a> {
    fn of(row: &'a Row) -> Self {
        Setting {
            device: &row.device,
            mode: &row.mode,
            ranks: row.ranks,
            hidden: row.hidden,
            dtype: &row.dtype,
            experts: row.experts,
            topk: row.topk,
            routing: &row.routing,
            cache: &row.cache,
            scope: &row.scope,
        }
    }

    fn title(&self) -> String {
        let Setting { device, mode, ranks, hidden, dtype, experts, topk, routing, cache, scope } = self;
        let scope = if scope.is_empty() { String::new() } else { format!(", {scope}") };
        format!(
            "{device}, {ranks} {mode}, hidden {hidden} {dtype}, top-{topk} of {experts}, {routing} routing, {cache}{scope}"
        )
    }

    fn file(&self) -> String {
        let Setting { device, mode, ranks, hidden, dtype, experts, topk, routing, cache, scope } = self;
        let scope = if scope.is_empty() { String::new() } else { format!("-{scope}") };
        format!("{device}-{ranks}-{mode}-h{hidden}-{dtype}-top{topk}of{experts}-{routing}-{cache}{scope}")
            .replace(|c: char| !c.is_ascii_alphanumeric() && !"-_.".contains(c), "_")
    }
}

/// The name in the legend, and whether it is one of liba2a's: peers have no layout, a thin line and hollow points.
type Name<'a> = (&'a str, &'a str);

/// By series, then by tokens; several measurements of one point stay several.
type Series<'a> = BTreeMap<Name<'a>, Vec<(f64, f64)>>;

/// Microseconds (p50), or logical GB/s, of a row.
struct Quantity {
    file: &'static str,
    axis: &'static str,
    of: fn(&Row) -> f64,
}

const QUANTITIES: [Quantity; 2] = [
    Quantity { file: "time", axis: "p50 of the slowest rank, µs", of: |row| row.p50_us },
    Quantity {
        file: "bandwidth",
        axis: "logical GB/s of the busiest rank",
        of: |row| row.logical_bytes as f64 / row.p50_us / 1e3,
    },
];

/// Writes `<setting>-time.svg` and `<setting>-bandwidth.svg` into the folder `out`, which it makes. The same rows give
/// the same bytes. A row that has no place on logarithmic axes (no tokens, no time, no bytes) is left out.
pub fn plot(rows: &[Row], out: &Path) -> Result<(), String> {
    fs::create_dir_all(out).map_err(|error| format!("cannot make {}: {error}", out.display()))?;
    // A name has one colour in all pictures of a call.
    let names: BTreeSet<Name> = rows.iter().map(|row| (&*row.backend, &*row.layout)).collect();
    let colours: BTreeMap<Name, RGBColor> = names.into_iter().zip(COLOURS.into_iter().cycle()).collect();

    let mut settings: BTreeMap<Setting, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        settings.entry(Setting::of(row)).or_default().push(row);
    }
    let mut files = BTreeSet::new();
    for (setting, rows) in &settings {
        for quantity in &QUANTITIES {
            let panels = panels(rows, quantity.of);
            if panels.is_empty() {
                continue;
            }
            let file = format!("{}-{}.svg", setting.file(), quantity.file);
            let path = out.join(&file);
            if !files.insert(file) {
                return Err(format!("two settings would both be drawn into {}", path.display()));
            }
            let svg = draw(&setting.title(), quantity.axis, &panels, &colours)
                .map_err(|error| format!("cannot draw {}: {error}", path.display()))?;
            fs::write(&path, svg).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        }
    }
    if files.is_empty() {
        return Err(format!("nothing to plot: none of {} rows has tokens and a time", rows.len()));
    }
    Ok(())
}

/// The operations that were measured, with their series.
fn panels<'a>(rows: &[&'a Row], of: fn(&Row) -> f64) -> Vec<(&'static str, Series<'a>)> {
    let mut panels = Vec::new();
    for operation in OPERATIONS {
        let mut series = Series::new();
        for row in rows.iter().filter(|row| row.operation == operation) {
            let (x, y) = (row.tokens as f64, of(row));
            if x > 0.0 && y > 0.0 && y.is_finite() {
                series.entry((&row.backend, &row.layout)).or_default().push((x, y));
            }
        }
        series
            .values_mut()
            .for_each(|points| points.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))));
        if !series.is_empty() {
            panels.push((operation, series));
        }
    }
    panels
}

fn draw(
    title: &str,
    axis: &str,
    panels: &[(&str, Series)],
    colours: &BTreeMap<Name, RGBColor>,
) -> Result<String, Box<dyn std::error::Error>> {
    let width = PANEL.0 * panels.len() as u32;
    let columns = width / LEGEND_ENTRY;
    let names: BTreeSet<Name> = panels.iter().flat_map(|(_, series)| series.keys().copied()).collect();
    let height = TITLE + PANEL.1 + LEGEND_LINE * (names.len() as u32).div_ceil(columns) + LEGEND_LINE / 2;

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&GROUND)?;
        // Narrow pictures have a title of several lines' length: it shrinks to fit.
        let size = (f64::from(width - 20) / title.chars().count().max(1) as f64 * 1.9).min(20.0);
        root.draw(&Text::new(title.to_owned(), (12, 12), (FONT, size).into_font().color(&INK)))?;

        let (top, legend) = root.split_vertically(TITLE + PANEL.1);
        let (_, top) = top.split_vertically(TITLE);
        // One range for all panels, so that operations can be compared across them.
        let points = || panels.iter().flat_map(|(_, series)| series.values().flatten());
        let xs = points().map(|point| point.0);
        let ys = points().map(|point| point.1);
        let (xs, ys) = (Axis::over(xs, x_ticks), Axis::over(ys, y_ticks));
        for (at, (area, (operation, series))) in
            top.split_evenly((1, panels.len())).iter().zip(panels).enumerate()
        {
            let mut chart = ChartBuilder::on(area)
                .caption(operation, (FONT, 18).into_font().color(&INK))
                .margin(10)
                .x_label_area_size(44)
                .y_label_area_size(60)
                .build_cartesian_2d(
                    (xs.from..xs.to).log_scale().with_key_points(xs.ticks.clone()),
                    (ys.from..ys.to).log_scale().with_key_points(ys.ticks.clone()),
                )?;
            let text = || (FONT, 14).into_font().color(&INK);
            chart
                .configure_mesh()
                .bold_line_style(GRID)
                .light_line_style(TRANSPARENT)
                .axis_style(INK)
                .label_style(text())
                .axis_desc_style(text())
                .x_desc("tokens of each rank")
                .y_desc(if at == 0 { axis } else { "" })
                .x_label_formatter(&short)
                .y_label_formatter(&short)
                .draw()?;
            for (name, points) in series {
                let colour = colours[name];
                chart.draw_series(LineSeries::new(points.iter().copied(), line(name, colour)))?;
                chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, GROUND.filled())))?;
                chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, point(name, colour))))?;
            }
        }

        for (at, name) in names.iter().enumerate() {
            let (column, row) = (at as u32 % columns, at as u32 / columns);
            let (x, y) = ((16 + column * LEGEND_ENTRY) as i32, (row * LEGEND_LINE + LEGEND_LINE / 2) as i32);
            let colour = colours[name];
            legend.draw(&PathElement::new([(x, y), (x + 32, y)], line(name, colour)))?;
            legend.draw(&Circle::new((x + 16, y), 4, GROUND.filled()))?;
            legend.draw(&Circle::new((x + 16, y), 4, point(name, colour)))?;
            let label = format!("{} {}", name.0, name.1);
            let font = (FONT, 15).into_font().color(&INK);
            legend.draw(&Text::new(label.trim_end().to_owned(), (x + 40, y - 6), font))?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn line(name: &Name, colour: RGBColor) -> ShapeStyle {
    colour.stroke_width(if name.1.is_empty() { 1 } else { 2 })
}

fn point(name: &Name, colour: RGBColor) -> ShapeStyle {
    if name.1.is_empty() { colour.stroke_width(1) } else { colour.filled() }
}

/// A logarithmic axis and where its labels stand.
struct Axis {
    from: f64,
    to: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// Wider than its points, so that one point alone has an axis too.
    fn over(points: impl Iterator<Item = f64> + Clone, ticks: fn(Vec<f64>) -> Vec<f64>) -> Axis {
        let least = points.clone().fold(f64::INFINITY, f64::min);
        let most = points.clone().fold(0.0, f64::max);
        Axis { from: least / 1.5, to: most * 1.5, ticks: ticks(points.collect()) }
    }
}

/// The tokens that were measured, every other one from the largest while they are too many to be read.
fn x_ticks(mut points: Vec<f64>) -> Vec<f64> {
    points.sort_by(f64::total_cmp);
    points.dedup();
    while points.len() > 9 {
        points = points.into_iter().rev().step_by(2).collect();
        points.reverse();
    }
    points
}

/// 1, 2, 5, 10 and so on, only the powers of ten over many decades.
fn y_ticks(points: Vec<f64>) -> Vec<f64> {
    let least = points.iter().copied().fold(f64::INFINITY, f64::min) / 1.5;
    let most = points.iter().copied().fold(0.0, f64::max) * 1.5;
    let decades = least.log10().floor() as i32..=most.log10().ceil() as i32;
    let steps: &[f64] = if most / least > 1e4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    decades
        .flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)))
        .filter(|tick| (least..=most).contains(tick))
        .collect()
}

/// 0.05, 5, 500, 20 k.
fn short(value: &f64) -> String {
    let places = |value: f64| if value < 1.0 { (-value.log10()).ceil() as usize } else { 0 };
    match *value {
        v if v >= 1e6 => format!("{:.0} M", v / 1e6),
        v if v >= 1e4 && v % 1e3 == 0.0 => format!("{:.0} k", v / 1e3),
        v => format!("{v:.*}", places(v)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::row;

    /// Two series over three sizes, of which one has no combine.
    fn table() -> Vec<Row> {
        let mut rows = Vec::new();
        for (tokens, us) in [(2048, 9e3), (1, 20.0), (128, 700.5)] {
            rows.push(row("high_throughput", "flat", tokens, "dispatch", us));
            rows.push(row("high_throughput", "flat", tokens, "combine", us / 2.0));
            rows.push(row("memcpy", "", tokens, "dispatch", us / 4.0));
        }
        rows
    }

    fn drawn(rows: &[Row]) -> BTreeMap<String, String> {
        let folder = tempfile::tempdir().unwrap();
        plot(rows, &folder.path().join("plots")).unwrap();
        let files = fs::read_dir(folder.path().join("plots")).unwrap();
        files
            .map(|file| file.unwrap())
            .map(|file| (file.file_name().into_string().unwrap(), fs::read_to_string(file.path()).unwrap()))
            .collect()
    }

    const TIME: &str = "cpu-4-processes-h7168-bf16-top8of64-hash-warm-time.svg";
    const BANDWIDTH: &str = "cpu-4-processes-h7168-bf16-top8of64-hash-warm-bandwidth.svg";

    /// Drawn lines that are thick, lines that are thin, filled points, hollow points; without those of the legend.
    fn counts(svg: &str, legend: (usize, usize)) -> [usize; 4] {
        let count = |element: &str, style: &str| {
            svg.split('<').filter(|part| part.starts_with(element) && part.contains(style)).count()
        };
        let coloured = |part: &&str| {
            COLOURS.iter().any(|c| part.contains(&format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2)))
        };
        let lines = |width: &str| {
            svg.split('<')
                .filter(|part| part.starts_with("polyline") && part.contains(width))
                .filter(coloured)
                .count()
        };
        let filled = svg
            .split('<')
            .filter(|part| part.starts_with("circle") && !part.contains("fill=\"none\""))
            .filter(coloured)
            .count();
        let hollow = count("circle", "fill=\"none\"");
        [
            lines("stroke-width=\"2\"") - legend.0,
            lines("stroke-width=\"1\"") - legend.1,
            filled - legend.0,
            hollow - legend.1,
        ]
    }

    #[test]
    fn a_line_for_each_series_and_a_mark_for_each_row() {
        let pictures = drawn(&table());
        assert_eq!(pictures.keys().collect::<Vec<_>>(), [BANDWIDTH, TIME]);
        for svg in pictures.values() {
            assert_eq!(counts(svg, (1, 1)), [2, 1, 6, 3]);
            for text in ["high_throughput flat", "memcpy", "dispatch", "combine", "2048"] {
                assert!(svg.lines().any(|line| line == text), "{text}");
            }
            assert!(!svg.lines().any(|line| line == "pair"), "nobody measured it");
        }
        let split = row("low_latency", "expert_padded", 128, "dispatch_split", 30.0);
        assert!(drawn(&[split])[TIME].lines().any(|line| line == "dispatch_split"));
        assert!(pictures[TIME].contains("µs") && pictures[BANDWIDTH].contains("GB/s"));
    }

    #[test]
    fn points_lie_where_logarithms_put_them() {
        // A hundredfold of both: as many pixels to the right for each decade, and as many up.
        let rows = [1, 10, 100].map(|n| row("a", "b", n, "pair", n as f64 * 50.0));
        let svg = &drawn(&rows)[TIME];
        let value = |part: &str, name: &str| -> i32 {
            let behind = part.split(&format!("{name}=\"")).nth(1).unwrap();
            behind.split('"').next().unwrap().parse().unwrap()
        };
        let circles: Vec<_> =
            svg.split('<').filter(|part| part.starts_with("circle")).skip(3).take(3).collect();
        let at = |n: usize| (value(circles[n], "cx"), value(circles[n], "cy"));
        let step = |from: usize| (at(from + 1).0 - at(from).0, at(from).1 - at(from + 1).1);
        assert!(step(0).0 > 100 && step(0).1 > 100, "{circles:?}");
        assert!(step(0).0.abs_diff(step(1).0) <= 1 && step(0).1.abs_diff(step(1).1) <= 1, "{circles:?}");
    }

    #[test]
    fn each_setting_has_its_pictures() {
        let mut rows = table();
        rows.extend(table().into_iter().map(|row| Row { cache: "cold".into(), ..row }));
        rows.extend(table().into_iter().map(|row| Row { scope: "all".into(), ..row }));
        rows.extend(table().into_iter().map(|row| Row { routing: "<a>&\"b\"/c".into(), ..row }));
        let pictures = drawn(&rows);
        assert_eq!(pictures.len(), 8);
        assert!(pictures.contains_key(&TIME.replace("-time", "-all-time")));
        let svg = &pictures["cpu-4-processes-h7168-bf16-top8of64-_a___b__c-warm-time.svg"];
        assert!(svg.contains("&lt;a&gt;&amp;") && !svg.contains("<a>"));

        let clash = [table(), vec![Row { routing: "a b".into(), ..rows[0].clone() }]].concat();
        let clash = [clash, vec![Row { routing: "a/b".into(), ..rows[0].clone() }]].concat();
        let why = plot(&clash, tempfile::tempdir().unwrap().path()).unwrap_err();
        assert!(why.starts_with("two settings would both be drawn into "), "{why}");
    }

    #[test]
    fn the_order_of_the_rows_does_not_matter() {
        let mut reversed = table();
        reversed.reverse();
        assert_eq!(drawn(&table()), drawn(&reversed));
    }

    #[test]
    fn one_point_is_a_picture() {
        let pictures = drawn(&[row("memcpy", "", 128, "dispatch", 33.0)]);
        assert_eq!(counts(&pictures[TIME], (0, 1)), [0, 1, 0, 1]);
        assert!(!pictures[TIME].contains("NaN"));
    }

    #[test]
    fn no_rows_is_a_sentence() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(
            plot(&[], folder.path()).unwrap_err(),
            "nothing to plot: none of 0 rows has tokens and a time"
        );
        let no_place = [
            row("a", "b", 0, "pair", 1.0),
            row("a", "b", 1, "pair", 0.0),
            row("a", "b", 1, "pair", f64::NAN),
        ];
        let why = plot(&no_place, folder.path()).unwrap_err();
        assert_eq!(why, "nothing to plot: none of 3 rows has tokens and a time");
    }

    #[test]
    fn labels_are_short() {
        let labels = [0.05, 0.2, 1.0, 500.0, 2048.0, 8192.0, 16384.0, 20e3, 5e6];
        let expected = ["0.05", "0.2", "1", "500", "2048", "8192", "16384", "20 k", "5 M"];
        assert_eq!(labels.map(|value| short(&value)), expected);
        assert_eq!(y_ticks(vec![30.0, 400.0]), [20.0, 50.0, 100.0, 200.0, 500.0]);
        assert_eq!(y_ticks(vec![1.0, 3e5]), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        let tokens = (0..12).rev().map(|n| f64::from(1 << n)).collect();
        assert_eq!(x_ticks(tokens), [2.0, 8.0, 32.0, 128.0, 512.0, 2048.0]);
    }
}
