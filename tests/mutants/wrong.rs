//! Kernels that are wrong as a whole, each in a way that a careless test would let pass.

use lamina::gpu::Call;

use super::{Edit, case, cases, device, devices, run, run_edited};
use lamina::check::Prepared;
use lamina::wgsl;

/// Runs the broken kernel on every adapter, which must fail it.
fn must_fail(what: &str, words: &[&str], edits: &[Edit]) {
    let prepared = case("mla_decode", words);
    for device in devices() {
        let outcome = run_edited(&prepared, &device, "portable", edits).expect("the edited files are in it");
        assert!(!outcome.passed, "{what} passes on {}: {outcome:?}", device.caps().label());
    }
}

/// Sequences of several lengths and a chunked cache, for a few milliseconds.
const BATCH: &[&str] = &["(150, 2)", "Even"];

#[test]
fn all_zeros_fail() {
    let edit = Edit::new("mla_decode", "= factor * folded", "= 0.0 * factor * folded");
    must_fail("all zeros", BATCH, &[edit]);
}

#[test]
fn the_mean_of_the_values_fails() {
    let edit = Edit::new("lib/score_plain", "select(NOTHING, product,", "select(NOTHING, 0.0 * product,");
    must_fail("the mean of V", BATCH, &[edit]);
}

#[test]
fn attention_without_the_rope_part_fails() {
    let edit = Edit::new("mla_decode", "return queries[", "return f32(quad < R / 4u) * queries[");
    must_fail("no rope part", BATCH, &[edit]);
}

#[test]
fn a_softmax_without_its_maximum_fails() {
    let edits = [
        Edit::new("lib/fold", "exp2(scores - fold_maximum)", "exp2(scores)"),
        Edit::new("lib/fold", "exp2(fold_maximum - largest), moved", "vec2<f32>(1.0), moved"),
        Edit::new("lib/fold", "fold_scales[row / 2u][row % 2u] + log2", "log2"),
    ];
    must_fail("no maximum subtracted", &["Extreme", "32+8"], &edits);
}

#[test]
fn accumulators_of_f16_fail_at_70_000_tokens() {
    let rounded = "fn rounded(v: vec4<f32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(pack2x16float(v.xy)), unpack2x16float(pack2x16float(v.zw)));
}
";
    let at = ["folded[2u * pair]", "folded[2u * pair + 1u]"];
    let weighed = |at: &str, part| {
        let [from, to] =
            [format!("{at} += weight.{part} * value"), format!("{at} = rounded({at} + weight.{part} * value)")];
        Edit::new("lib/fold", &from, &to)
    };
    let function = "fn add_value(";
    let helper = Edit::new("lib/fold", function, &format!("{rounded}{function}"));
    let edits = [helper, weighed(at[0], "x"), weighed(at[1], "y")];
    // An even softmax, where every token counts: seconds on a CPU driver.
    let (prepared, device) = (case("mla_decode", &["(69999, 1)", "Even"]), device());
    let outcome = run_edited(&prepared, &device, "portable", &edits).expect("the edited file is in it");
    assert!(!outcome.passed, "{}: {outcome:?}", device.caps().label());
}

#[test]
fn a_page_too_far_fails() {
    let next = Edit::new("lib/rows_paged", "(token >> params.page_bits)]", "(token >> params.page_bits) + 1u]");
    must_fail("the next page", BATCH, &[next]);
    let other = Edit::new("lib/rows_paged", "- params.first_page", "- params.first_page + 1u");
    must_fail("the page behind", BATCH, &[other]);
}

#[test]
fn no_number_and_one_wrong_element_fail() {
    let store = "partials[at + column] = factor * folded[2u * turn * BAND + i];";
    let with = |what: &str| {
        let place = "column == 1u && block_first + row == 3u && split.begin == 0u";
        Edit::new("mla_decode", store, &format!("{store}\nif ({place}) {{ partials[at + column].y {what}; }}"))
    };
    must_fail("NaN", BATCH, &[with("= bitcast<f32>(0x7fc00000u + lane - lane)")]);
    must_fail("an element 0.1 % too large", BATCH, &[with("*= 1.001")]);
}

/// Exchanges what two names are bound to.
fn swap(call: &mut Call, names: [&str; 2]) -> bool {
    let [a, b] = names.map(|name| call.bindings.iter().position(|(n, _)| *n == name).expect("a binding"));
    let view = call.bindings[a].1.clone();
    call.bindings[a].1 = std::mem::replace(&mut call.bindings[b].1, view);
    true
}

#[test]
fn swapped_buffers_fail() {
    for (kernel, names) in [
        ("mla_decode", ["queries", "cache"]),
        ("add", ["x", "y"]),
        ("swiglu", ["gate", "up"]),
        ("mla_append", ["kv", "weight"]),
    ] {
        // Of a row or more, where buffers are not of the same few numbers.
        let case =
            cases(kernel).into_iter().find(|case| case.flops > 1e3 && !case.name.contains("halves")).expect("one");
        let prepared = Prepared::new(case).expect("the cpu device has no faults");
        for device in devices() {
            let outcome = run(&prepared, &device, "portable", |call| swap(call, names)).expect("the kernel is called");
            assert!(!outcome.passed, "{names:?} of {kernel} swapped, on {}: {outcome:?}", device.caps().label());
        }
    }
}

/// Each barrier of the fold and of its transposition: the file, its text with as much before it as tells it
/// from the others, and the software Vulkan drivers on which a kernel without it is wrong. Where it is not,
/// subgroups happen to run in an order that does no harm, or eight lanes in step. No driver here shows the
/// barrier between the last tile and the totals. Real GPUs may show all of them or none.
const BARRIERS: &[(&str, &str, &[&str])] = &[
    ("lib/fold", "base += TILE) {\n    workgroupBarrier();", &["llvmpipe", "SwiftShader"]),
    ("lib/fold", "      }\n    }\n    workgroupBarrier();", &["llvmpipe", "SwiftShader"]),
    ("lib/fold", "products(part, pair, lane);\n    }\n    workgroupBarrier();", &["llvmpipe"]),
    ("lib/fold", "softmax(base, ends, lane);\n    }\n    workgroupBarrier();", &["llvmpipe", "SwiftShader"]),
    ("lib/fold", "  }\n\n  workgroupBarrier();", &[]),
    ("lib/fold", "    }\n  }\n  workgroupBarrier();", &["llvmpipe", "SwiftShader"]),
    ("lib/transpose8_shared", "(TILE > 4u) {\n    workgroupBarrier();", &["SwiftShader"]),
    ("lib/transpose8_shared", "lane] = high.w;\n  workgroupBarrier();", &["SwiftShader"]),
];

#[test]
fn a_dropped_barrier_fails() {
    let sources = [wgsl!("lib/fold"), wgsl!("lib/transpose8_shared")];
    let all: usize = sources.iter().map(|source| source.text.matches("workgroupBarrier();").count()).sum();
    assert_eq!(all, BARRIERS.len(), "a barrier is not in the list");
    // Many lanes that share the work of a row, and many rows, over several tiles.
    let words: [&[&str]; 2] = [&["of 512+64", "(57, 8)"], BATCH];
    let prepared = words.map(|words| case("mla_decode", words));
    for device in devices().iter().filter(|device| device.caps().backend == "vulkan") {
        for (file, text, drivers) in BARRIERS {
            if drivers.iter().any(|driver| device.caps().name.contains(driver)) {
                let edits = [Edit::new(file, text, text.strip_suffix("workgroupBarrier();").expect("it ends so"))];
                let fails =
                    |p: &Prepared| !run_edited(p, device, "portable", &edits).expect("every case has it").passed;
                assert!(prepared.iter().any(fails), "{}: {text:?} is not missed", device.caps().label());
            }
        }
    }
}

/// Wrong kernels of other names: kernel, file, text, and what is wrong.
const OTHERS: &[(&str, &str, &str, &str)] = &[
    ("add", "add", "params.scale * y[i]", "y[i]"),
    ("embed", "embed", "(id - params.first)", "id"),
    ("gqa_append", "gqa_append", "y * cosine + x * sine", "y * cosine - x * sine"),
    ("gqa_append", "gqa_append", "row.position & ((1u", "(row.position + 1u) & ((1u"),
    ("gqa_decode", "gqa_decode", "sum += weight;", ""),
    ("gqa_decode", "gqa_decode", "let scale = exp2(maximum[r] - largest);", "let scale = 1.0;"),
    ("gqa_decode", "gqa_decode", "min(ends[r], split.end)", "split.end"),
    ("gqa_decode", "gqa_decode", "* exp2(sums[b * ROWS + r] - largest)", ""),
    ("gqa_decode", "gqa_decode", " + UNITS];", "];"),
    ("mla_absorb", "mla_absorb", "x * turn.y + y * turn.x", "x * turn.y - y * turn.x"),
    ("mla_absorb", "mla_absorb", "staged[(i + k * SLICES) * TOKENS + t]", "staged[i * TOKENS + t]"),
    ("mla_append", "mla_append", "row.position % PAGE, lane", "(row.position + 1u) % PAGE, lane"),
    ("mla_append", "mla_append", "/ f32(R) + params.eps", "/ f32(R)"),
    ("mla_combine", "mla_combine", "merged += weight * part[k]", "merged += part[k]"),
    ("mla_combine", "mla_combine", "* LN_2", ""),
    ("mla_gather", "mla_gather", "position % PAGE, page <", "(position + 1u) % PAGE, page <"),
    ("mla_gather", "mla_gather", "span.row + first - span.begin + key", "span.row + first + key"),
    ("mla_prefill", "mla_prefill", "(vec4<u32>(key0) <= rows)", "(vec4<u32>(key0) < rows)"),
    ("mla_prefill", "mla_prefill", "total *= shrink;", ""),
    ("mla_prefill", "mla_prefill", "log(1.0 + steps)", "log(2.0 + steps)"),
    ("moe_route", "moe_route", "key == own[k] && i <", "key == own[k] && i >"),
    ("moe_route", "moe_route", "weight /= sum;", ""),
    ("rms_norm", "rms_norm", "/ f32(params.length) + params.eps", "/ f32(params.length)"),
    ("rms_norm", "rms_norm", "+ last * last", ""),
    ("rope", "rope", "a * turn.x - b * turn.y", "a * turn.x + b * turn.y"),
    ("swiglu", "swiglu", "activation(g) * u", "g * u"),
];

#[test]
fn broken_lines_of_other_kernels_fail() {
    let device = device();
    for (kernel, file, from, to) in OTHERS {
        let edits = [Edit::new(file, from, to)];
        let fails = |case| {
            let prepared = Prepared::new(case).expect("the cpu device has no faults");
            run_edited(&prepared, &device, "portable", &edits).is_some_and(|outcome| !outcome.passed)
        };
        assert!(cases(kernel).into_iter().any(fails), "{kernel} passes with {to:?} in place of {from:?}");
    }
    let mut kernels: Vec<&str> = OTHERS.iter().map(|(kernel, ..)| *kernel).collect();
    kernels.dedup();
    assert!(kernels.len() >= 5);
}
