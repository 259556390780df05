//! `mla_decode` with each line of its arithmetic broken in turn: some case must fail.
//!
//! Every statement of the files is found in their text, so that a new line is broken, too: a value is
//! doubled, a condition turned round, a loop ends one turn early, a call is left out. Where that would
//! not compile, or would give the right answer all the same, [`BROKEN`] says what to write instead. A
//! statement without a broken form that shows is a failure of this test.

use lamina::check::Prepared;
use lamina::kernels::{Kernel, mla_decode::MlaDecode};
use lamina::wgsl;

use super::{Edit, case, device, run_edited};

/// No number, such that no compiler sees it.
const NAN: &str = "bitcast<f32>(0x7fc00000u + lane - lane)";

/// File, statement, and what breaks it; `NAN` and `GARBAGE` in it stand for the texts of these names.
/// Several for one statement must all fail.
const BROKEN: &[(&str, &str, &str)] = &[
    ("mla_decode", "let split = splits[params.first_split + block.y];", "let split = splits[block.y];"),
    ("mla_decode", "let sequence = batch[split.sequence];", "let sequence = batch[split.sequence / 2u];"),
    ("mla_decode", FOLD, "fold(sequence.pages + 1u, split.begin, split.end, lane);"),
    ("mla_decode", FOLD, "fold(sequence.pages, split.begin + 1u, split.end, lane);"),
    ("mla_decode", FOLD, "fold(sequence.pages, split.begin, split.end - 1u, lane);"),
    // Any lane may write it: all know it.
    ("mla_decode", "if (lane % COLUMN_LANES == 0u) {", "if (lane % COLUMN_LANES == COLUMN_LANES) {"),
    // How the work is shared may be chosen freely, as long as all of it is done.
    ("lib/fold", LANES, "const LANES = min(WORKGROUP / PAIRS, QUADS + 7u) / 8u * 8u + 4u;"),
    ("lib/fold", "const STEPS = (QUADS + LANES - 1u) / LANES;", "const STEPS = max(QUADS / LANES, 1u);"),
    ("lib/fold", "const PIECES = LANES / 8u;", "const PIECES = max(LANES / 16u, 1u);"),
    ("lib/fold", LOADS, "const LOADS = max(TILE * UNITS / WORKGROUP, 1u);"),
    ("lib/fold", COLUMN_LANES, "const COLUMN_LANES = COLUMNS / PASSES;"),
    ("lib/fold", "const BAND = (PAIRS + BANDS - 1u) / BANDS;", "const BAND = max(PAIRS / BANDS, 1u);"),
    ("lib/fold", "const MARGIN = 8.0;", "const MARGIN = 1000.0;"),
    // Behind the end only what is no number shows: it weighs 0.
    ("lib/fold", LOAD, "fold_next[i] = cache[first + min(unit, TILE * UNITS - 1u)];"),
    ("lib/fold", LOAD, "fold_next[i] = cache[first + unit % UNITS];"),
    ("lib/fold", "var largest = vec2<f32>(NOTHING);", "var largest = vec2<f32>(0.0);"),
    // Any scores may be left out of the maximum, as long as none passes it by far.
    ("lib/fold", "for (var t = 0u; t < TILE; t++) {", "for (var t = 0u; t < 1u; t++) {"),
    ("lib/fold", "for (var part = 0u; part < TILE; part += 4u) {", "for (var part = 4u; part < TILE; part += 4u) {"),
    // All four lanes of a pair know it.
    ("lib/fold", "if (lane % 4u == 0u) {", "if (lane % 4u == 4u) {"),
    // Of two rows either may move alone.
    ("lib/fold", MOVED, "if (moved.x) {"),
    ("lib/fold", MOVED, "if (moved.y) {"),
    // A turn takes two pairs of rows.
    ("lib/fold", "for (var i = 0u; i < BAND; i += 2u) {", "for (var i = 2u; i < BAND; i += 2u) {"),
    ("lib/fold", "fold_maximum = vec2<f32>(NOTHING);", "fold_maximum = vec2<f32>(0.0);"),
    // Any number would do: the first tile's scale is 0.
    ("lib/fold", "fold_total = vec2<f32>(0.0);", "fold_total = vec2<f32>(NAN);"),
    ("lib/fold", "folded[i] = vec4<f32>(0.0);", "folded[i] = vec4<f32>(NAN);"),
    ("lib/score_plain", "const NOTHING = -3.0e38;", "const NOTHING = -3.0e1;"),
    (
        "lib/score_plain",
        "return select(NOTHING, product, token < end);",
        "return select(NOTHING, product, token <= end);",
    ),
    // Any unit may do it; and what nobody does shows by what was there before.
    ("lib/cache_fp8", "if (unit == 0u) {", "GARBAGE if (unit == UNITS) {"),
    ("lib/cache_fp8", PADDING, "GARBAGE for (var pair = (R + P) / 2u; pair + 1u < W / 2u; pair++) {"),
    ("lib/cache_fp8", "tile[token * (W / 2u) + pair] = 0u;", "tile[token * (W / 2u) + pair] = 0xffffffffu;"),
    // A wider stride than needed is as good.
    ("lib/transpose8_shared", "const TRANSPOSE_STRIDE = WORKGROUP + 1u;", "const TRANSPOSE_STRIDE = WORKGROUP - 1u;"),
];
/// Statements that cannot be broken so that a case fails, and why.
const FREE: &[(&str, &str)] = &[
    // With more passes each lane takes fewer columns; with fewer there is no band of lanes: it does not compile.
    ("lib/fold", "const PASSES = (COLUMNS + WORKGROUP - 1u) / WORKGROUP;"),
    // Such memory is zero at first, and the first tile's scale is.
    ("lib/fold", "for (var i = 0u; i < 2u * PASSES * BAND; i++) {"),
    // A declaration.
    ("lib/fold", "var own: array<vec2<f32>, TILE / 4u>;"),
    // All maxima move in the first tile, where there is nothing to rescale.
    ("lib/fold", "if (lane == 0u) {"),
    ("lib/fold", "fold_moved.x = 0xffffffffu;"),
    // Whether there is a barrier, which `a_dropped_barrier_fails` is about.
    ("lib/transpose8_shared", "if (TILE > 4u) {"),
];

/// No number in the last place of a padded record of fp8.
const GARBAGE: &str = "if (W > R + P && unit == 0u) { tile[token * (W / 2u) + W / 2u - 1u] = 0xffffffffu; }";
const PADDING: &str = "for (var pair = (R + P) / 2u; pair < W / 2u; pair++) {";
const FOLD: &str = "fold(sequence.pages, split.begin, split.end, lane);";
const LANES: &str = "const LANES = min(WORKGROUP / PAIRS, QUADS + 7u) / 8u * 8u;";
const LOADS: &str = "const LOADS = (TILE * UNITS + WORKGROUP - 1u) / WORKGROUP;";
const COLUMN_LANES: &str = "const COLUMN_LANES = (COLUMNS + PASSES - 1u) / PASSES;";
const MOVED: &str = "if (moved.x || moved.y) {";
const LOAD: &str = "fold_next[i] = cache[first + select(unit % UNITS, unit, unit < min(end - token, TILE) * UNITS)];";

/// Cases that fail together for every broken line, the most telling first.
const CASES: &[&[&str]] = &[
    &["(150, 2)", "F16"],
    &["(150, 2)", "Fp8"],
    &["(150, 2)", "F32"],
    &["Extreme", "F16"],
    &["Extreme", "F32"],
    &["of 512+64", "(62, 1)", "F16"],
    &["of 512+64", "(57, 8)", "F32"],
    &["of 1040+6"],
    &["20 heads of 256+32", "(61, 4)"],
    &["of 32+8", "5 sequences", "F16", "Even"],
    &["of 48+16", "5 sequences", "Fp8", "Peaked"],
];

/// A statement: its text without a comment, and where it starts in the file.
struct Statement {
    code: String,
    start: usize,
}

/// The statements of a WGSL file: the lines of its functions and its constants. Declarations, braces,
/// bare returns and barriers (tested by themselves) are none.
fn statements(text: &str) -> Vec<Statement> {
    let (mut found, mut start, mut head, mut body) = (Vec::new(), 0, false, false);
    for line in text.split_inclusive('\n') {
        let code = line.split("//").next().expect("a first part").trim();
        match line {
            _ if head => (head, body) = (!code.ends_with('{'), code.ends_with('{')),
            _ if line.starts_with("fn ") => (head, body) = (!code.ends_with('{'), code.ends_with('{')),
            _ if line.starts_with('}') => body = false,
            _ if body || line.starts_with("const ") => {
                let none = ["", "}", "} else {", "return;", "workgroupBarrier();"].contains(&code);
                if !none {
                    let at = start + line.find(code).expect("it is a part of the line");
                    found.push(Statement { code: code.to_string(), start: at });
                }
            }
            _ => {}
        }
        start += line.len();
    }
    found
}

/// The general broken form of a statement.
fn broken(code: &str) -> String {
    if let Some(header) = code.strip_prefix("for (") {
        let (first, rest) = header.split_once("; ").expect("a for has three parts");
        return format!("for ({first}; {}", rest.replacen(" < ", " + 1u < ", 1));
    }
    for keyword in ["if (", "} else if ("] {
        if let Some(condition) = code.strip_prefix(keyword).and_then(|rest| rest.strip_suffix(") {")) {
            return format!("{keyword}!({condition})) {{");
        }
    }
    let statement = code.strip_suffix(';').unwrap_or_else(|| panic!("{code:?} takes more than a line"));
    let assignments = [" = ", " += ", " *= "].map(|sign| statement.find(sign).map(|at| at + sign.len()));
    let value = match statement.strip_prefix("return ") {
        Some(_) => Some("return ".len()),
        None => assignments.into_iter().flatten().min(),
    };
    let Some(value) = value else { return String::new() }; // a call, left out
    let (target, value) = statement.split_at(value);
    let compares = [" < ", " > ", " <= ", " >= ", " == ", " != "].iter().any(|sign| value.contains(sign));
    if compares && !value.starts_with("select(") {
        return format!("{target}!({value});");
    }
    let zero = ["0.0", "0u", "vec2<f32>(0.0)", "vec4<f32>(0.0)", "vec4<u32>(0u)"].contains(&value);
    match zero {
        true => format!("{target}{};", value.replace("0.0", "1.0").replace("0u", "1u")),
        false => format!("{target}({value}) + ({value});"),
    }
}

/// The edits that break a statement, one after the other.
fn edits(file: &str, text: &str, statement: &Statement) -> Vec<Edit> {
    let Statement { code, start } = statement;
    let listed = BROKEN.iter().filter(|(f, c, _)| f == &file && c == code);
    let mut forms: Vec<String> =
        listed.map(|(_, _, broken)| broken.replace("NAN", NAN).replace("GARBAGE", GARBAGE)).collect();
    if forms.is_empty() && !FREE.contains(&(file, code)) {
        forms.push(broken(code));
    }
    // As much before it as tells it from other places.
    let end = start + code.len();
    let mut from = *start;
    while text.matches(&text[from..end]).count() > 1 {
        from = text[..from - 1].rfind('\n').map_or(0, |at| at + 1);
    }
    let before = &text[from..*start];
    forms.iter().map(|form| Edit::new(file, &text[from..end], &format!("{before}{form}"))).collect()
}

/// Breaks each statement of the files; each must fail a case.
fn break_each(files: &[(&str, &str)], variant: &str) {
    let device = device();
    let cases: Vec<Prepared> = CASES.iter().map(|words| case("mla_decode", words)).collect();
    if !cases.iter().any(|case| (case.case().variants)(device.caps()).contains(&variant)) {
        eprintln!("{} has no variant {variant} of mla_decode", device.caps().label());
        return;
    }
    let mut survivors = Vec::new();
    for (file, text) in files {
        let statements = statements(text);
        assert!(!statements.is_empty(), "{file} has no statement");
        let unbroken = [Edit::new(file, text, text)];
        let uses = |case: &&Prepared| run_edited(case, &device, variant, &unbroken).is_some();
        let cases: Vec<&Prepared> = cases.iter().filter(uses).collect();
        for edit in statements.iter().flat_map(|statement| edits(file, text, statement)) {
            let fails = |case: &&Prepared| {
                run_edited(case, &device, variant, std::slice::from_ref(&edit)).is_some_and(|o| !o.passed)
            };
            if !cases.iter().any(fails) {
                survivors.push(format!("{file}: {:?} -> {:?}", edit.from, edit.to));
            }
        }
    }
    assert!(survivors.is_empty(), "these broken lines pass every case:\n{}", survivors.join("\n"));
}

macro_rules! files {
    ($($name:literal),*) => { &[$(($name, wgsl!($name).text)),*] };
}

#[test]
fn each_broken_line_of_the_kernel_and_of_what_finds_and_scores_a_token_fails() {
    assert_eq!(MlaDecode::SOURCE.text, wgsl!("mla_decode").text);
    break_each(files!["mla_decode", "lib/rows_paged", "lib/score_plain", "lib/transpose8_shared"], "portable");
    break_each(files!["lib/transpose8_subgroup"], "subgroup");
}

#[test]
fn each_broken_line_of_the_fold_fails() {
    break_each(files!["lib/fold"], "portable");
}

#[test]
fn each_broken_line_of_the_caches_formats_fails() {
    break_each(files!["lib/cache_f16", "lib/cache_f32", "lib/cache_fp8"], "portable");
}

#[test]
fn every_line_that_has_a_broken_form_of_its_own_is_there() {
    let files: &[(&str, &str)] =
        files!["mla_decode", "lib/fold", "lib/score_plain", "lib/cache_fp8", "lib/transpose8_shared"];
    let broken = BROKEN.iter().map(|(file, code, _)| (file, code));
    for (file, code) in broken.chain(FREE.iter().map(|(file, code)| (file, code))) {
        let (_, text) = files.iter().find(|(name, _)| name == file).expect("a file of mla_decode");
        assert!(statements(text).iter().any(|s| s.code == *code), "{file}.wgsl has no statement {code:?}");
    }
}

#[test]
fn general_broken_forms() {
    for (code, expected) in [
        ("for (var i = 0u; i < N; i++) {", "for (var i = 0u; i + 1u < N; i++) {"),
        ("if (a < b) {", "if (!(a < b)) {"),
        ("} else if (a) {", "} else if (!(a)) {"),
        ("let a = b + c;", "let a = (b + c) + (b + c);"),
        ("x[i] += y;", "x[i] += (y) + (y);"),
        ("var a = vec4<f32>(0.0);", "var a = vec4<f32>(1.0);"),
        ("let moved = a > b;", "let moved = !(a > b);"),
        ("return a;", "return (a) + (a);"),
        ("stage(a, b);", ""),
    ] {
        assert_eq!(broken(code), expected);
    }
    let text = "const A = 1u; // one\nfn f(a: u32,\n     b: u32) -> u32 {\n  let x = a; // a\n  return;\n}\n\
                struct S {\n  a: u32,\n}\n";
    assert_eq!(statements(text).iter().map(|s| s.code.as_str()).collect::<Vec<_>>(), ["const A = 1u;", "let x = a;"]);
}
