//! A plot of straight lines over two logarithmic axes, as a self-contained SVG.

use std::fmt::Write;

use crate::model::plan::human;

/// What the plot shows.
pub(super) struct Plot {
    pub(super) title: String,
    /// Least and greatest context, tokens.
    pub(super) contexts: (u64, u64),
    /// Name and bytes a token of each line.
    pub(super) lines: Vec<(String, u64)>,
    /// A level across: name and bytes.
    pub(super) level: Option<(String, u64)>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 500.0;
/// Edges of the plot itself: left, top, right, bottom.
const FRAME: (f64, f64, f64, f64) = (90.0, 60.0, 680.0, 440.0);
/// Colours that people who see colours differently tell apart (Okabe and Ito).
const COLOURS: [&str; 3] = ["#d55e00", "#0072b2", "#009e73"];
/// Least distance of two labels.
const APART: f64 = 18.0;

impl Plot {
    /// The text of the file.
    pub(super) fn svg(&self) -> String {
        let (left, top, right, bottom) = FRAME;
        let (low, high) = self.range();
        let x = |tokens: u64| left + (right - left) * self.along(tokens);
        let y = |bytes: f64| bottom - (bottom - top) * (bytes.log2() - low) / (high - low);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
             height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222\">\n\
             <title>{title}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"{left}\" y=\"32\" font-size=\"17\">{title}</text>\n",
            title = escaped(&self.title)
        );
        // Writing to a string cannot fail.
        let mut put = |text: std::fmt::Arguments| svg.write_fmt(text).expect("a string takes it");
        for octave in (low.ceil() as i32..=high.floor() as i32).filter(|octave| octave % 3 == 0) {
            let (at, name) = (y(f64::from(octave).exp2()), label(1u64 << octave));
            put(format_args!("<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>\n"));
            put(format_args!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\n", left - 8.0, at + 4.0));
        }
        let mut tokens = self.contexts.0;
        while tokens <= self.contexts.1 {
            let (at, name) = (x(tokens), context(tokens));
            put(format_args!("<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#eee\"/>\n"));
            put(format_args!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{name}</text>\n", bottom + 20.0));
            tokens *= 4;
        }
        let middle = (left + right) / 2.0;
        put(format_args!(
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">context, tokens</text>\n",
            bottom + 44.0
        ));
        put(format_args!("<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#222\"/>\n"));
        if let Some((name, bytes)) = &self.level {
            let at = y(*bytes as f64);
            put(format_args!("<path d=\"M{left} {at:.1}H{right}\" stroke=\"#222\" stroke-dasharray=\"6 4\"/>\n"));
            put(format_args!("<text x=\"{}\" y=\"{:.1}\">{}</text>\n", left + 8.0, at - 6.0, escaped(name)));
        }
        let ends: Vec<f64> = self.lines.iter().map(|(_, token)| y(bytes(*token, self.contexts.1))).collect();
        let labels = apart(&ends);
        for (i, (name, token)) in self.lines.iter().enumerate() {
            let (colour, end, label) = (COLOURS[i % COLOURS.len()], ends[i], labels[i]);
            let start = y(bytes(*token, self.contexts.0));
            put(format_args!(
                "<path d=\"M{left} {start:.1}L{right} {end:.1}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>\n"
            ));
            let (at, down, name, bytes) = (right + 8.0, label + 4.0, escaped(name), human(*token));
            put(format_args!("<text x=\"{at}\" y=\"{down:.1}\" fill=\"{colour}\">{name}, {bytes} a token</text>\n"));
        }
        svg + "</svg>\n"
    }

    /// Where a context stands along the axis, from 0 to 1.
    fn along(&self, tokens: u64) -> f64 {
        let log = |tokens: u64| (tokens as f64).log2();
        (log(tokens) - log(self.contexts.0)) / (log(self.contexts.1) - log(self.contexts.0))
    }

    /// Logarithms of the least and greatest bytes, with some air.
    fn range(&self) -> (f64, f64) {
        let (first, last) = self.contexts;
        let ends = self.lines.iter().flat_map(|(_, token)| [bytes(*token, first), bytes(*token, last)]);
        let all = ends.chain(self.level.iter().map(|(_, bytes)| *bytes as f64)).map(|bytes| bytes.max(1.0).log2());
        let (low, high) = all.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), log| (low.min(log), high.max(log)));
        (low.floor() - 1.0, high.ceil() + 1.0)
    }
}

/// Bytes of a context, which may be more than u64 holds.
fn bytes(token: u64, context: u64) -> f64 {
    token as f64 * context as f64
}

/// The labels' heights, moved down where two would touch.
fn apart(ends: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..ends.len()).collect();
    order.sort_by(|a, b| ends[*a].total_cmp(&ends[*b]));
    let mut labels = ends.to_vec();
    for pair in order.windows(2) {
        labels[pair[1]] = labels[pair[1]].max(labels[pair[0]] + APART);
    }
    labels
}

/// A power of two of bytes, without a fraction.
fn label(bytes: u64) -> String {
    human(bytes).replace(".0 ", " ")
}

/// A power of two of tokens.
fn context(tokens: u64) -> String {
    match tokens {
        0..1024 => tokens.to_string(),
        1024..0x10_0000 => format!("{}Ki", tokens >> 10),
        _ => format!("{}Mi", tokens >> 20),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_twice_as_steep_ends_an_octave_higher() {
        let lines = vec![("a".into(), 2048), ("b & <c>".into(), 1024)];
        let plot = Plot { title: "t".into(), contexts: (1024, 1 << 20), lines, level: Some(("free".into(), 1 << 33)) };
        let (low, high) = plot.range();
        assert_eq!((low, high), (19.0, 34.0));
        let svg = plot.svg();
        let octave = (FRAME.3 - FRAME.1) / (high - low);
        let end = |token: u64| FRAME.3 - octave * (((token << 20) as f64).log2() - low);
        assert!((end(1024) - end(2048) - octave).abs() < 1e-9);
        for part in [format!("L680 {:.1}", end(2048)), format!("L680 {:.1}", end(1024)), "b &amp; &lt;c&gt;".into()] {
            assert!(svg.contains(&part), "{part}: {svg}");
        }
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn labels_do_not_touch() {
        assert_eq!(apart(&[100.0, 90.0, 300.0]), [108.0, 90.0, 300.0]);
        assert_eq!(apart(&[50.0, 50.0, 50.0]), [50.0, 68.0, 86.0]);
    }
}
