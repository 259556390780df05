//! Tables of the terminal and of Markdown.

use serde::Serialize;

use super::super::table;
use crate::bench::ceilings::Ceilings;
use crate::bench::clock::By;
use crate::bench::report::Report;

/// What ran where, and how it was timed.
pub fn head<T: Serialize>(report: &Report<T>, markdown: bool) -> String {
    let commit = report.commit.map_or(String::new(), |commit| format!(" at {commit}"));
    let mut head = format!(
        "lamina {}{commit}, {} ({}), {}\n",
        report.version, report.device.adapter, report.device.backend, report.driver
    );
    if report.clock.by == By::Queue {
        let overhead = report.clock.overhead_us;
        head += &format!("No timestamps here: times by the queue, means of a submission less {overhead:.0} us each\n");
    }
    if markdown {
        head = format!("{head}\n`{}`\n", report.command);
    }
    head + "\n"
}

pub fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// Three digits, or all before the point.
pub fn digits(value: f64) -> String {
    let after = if value > 0.0 { (2 - value.log10().floor() as i32).clamp(0, 9) as usize } else { 0 };
    format!("{value:.after$}")
}

/// Rows as a table of the terminal, or of Markdown.
pub fn rows(header: &[&str], rows: &[Vec<String>], markdown: bool) -> String {
    if markdown {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let header: Vec<String> = header.iter().map(|cell| cell.to_string()).collect();
        let rule = vec!["---".to_string(); header.len()];
        return line(&header) + &line(&rule) + &rows.iter().map(|row| line(row)).collect::<String>() + "\n";
    }
    let mut table = table(header);
    for row in rows {
        table.add_row(row.clone());
    }
    table.trim_fmt() + "\n\n"
}

pub fn ceilings_table(ceilings: &Ceilings, markdown: bool) -> String {
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut lines = vec![
        row("read", format!("{} GB/s", digits(ceilings.read_gbs))),
        row("copy, read and written together", format!("{} GB/s", digits(ceilings.copy_gbs))),
        row("f32 multiply-adds", format!("{} TFLOP/s", digits(ceilings.f32_tflops))),
    ];
    lines.extend(ceilings.f16_tflops.map(|f16| row("f16 multiply-adds", format!("{} TFLOP/s", digits(f16)))));
    let matrix =
        ceilings.matrix_tflops.map(|matrix| row("matrix units, f16 to f32", format!("{} TFLOP/s", digits(matrix))));
    lines.extend(matrix);
    lines.push(row("a dispatch that waits for the one before", format!("{:.1} us", ceilings.dispatch_us)));
    lines.push(row("from a submission to its result", format!("{:.0} us", ceilings.round_trip_us)));
    rows(&["ceiling", "measured"], &lines, markdown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [2968.4, 63.38, 1.0, 0.0254, 3.71e-5, 0.0].map(digits),
            ["2968", "63.4", "1.00", "0.0254", "0.0000371", "0"]
        );
    }

    #[test]
    fn a_table_is_markdown_where_that_is_asked_for() {
        let lines = [vec!["read".to_string(), "3 GB/s".into()]];
        let [plain, markdown] = [false, true].map(|markdown| rows(&["ceiling", "measured"], &lines, markdown));
        assert_eq!(markdown, "| ceiling | measured |\n| --- | --- |\n| read | 3 GB/s |\n\n");
        assert!(plain.contains("read") && !plain.contains('|'), "{plain}");
    }
}
