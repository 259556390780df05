//! The parity harness is itself tested: with every one of these broken kernels it must fail.
//!
//! `wrong` holds kernels that are wrong as a whole, `lines` breaks each line of `mla_decode` in turn.

mod lines;
#[path = "../poison/mod.rs"]
mod poison;
mod wrong;

use std::cell::Cell;

use lamina::check::{Outcome, Prepared, adapters};
use lamina::gpu::{Call, Device, Options};
use lamina::kernels::{ALL, AnyCase, Set};

/// Every adapter of this system.
fn devices() -> Vec<Device> {
    adapters(&Options { checked: true, ..Options::default() })
}

/// One adapter, where many mutants are tried: the one that compiles fastest, if it is here.
fn device() -> Device {
    let mut devices = devices();
    let quick = |device: &Device| device.caps().name.contains("llvmpipe") && device.caps().backend == "vulkan";
    let at = devices.iter().position(quick).unwrap_or(0);
    devices.swap_remove(at)
}

/// The cases of a kernel, the cheapest first.
fn cases(kernel: &str) -> Vec<AnyCase> {
    let entry = ALL.iter().find(|entry| entry.name == kernel).expect("the kernel is in the list");
    let mut cases = (entry.cases)(Set::Pairs);
    cases.sort_by(|a, b| a.flops.total_cmp(&b.flops));
    cases
}

/// The cheapest case whose name holds all of `words`.
fn case(kernel: &str, words: &[&str]) -> Prepared {
    let found = cases(kernel).into_iter().find(|case| words.iter().all(|word| case.name.contains(word)));
    let found = found.unwrap_or_else(|| panic!("{kernel} has no case of {words:?}"));
    Prepared::new(found).expect("the cpu device has no faults")
}

/// A file of a shader, a text in it, and the text in its place.
#[derive(Clone, Debug)]
struct Edit {
    file: String,
    from: String,
    to: String,
}

impl Edit {
    fn new(file: &str, from: &str, to: &str) -> Edit {
        Edit { file: file.to_string(), from: from.to_string(), to: to.to_string() }
    }

    fn break_call(&self, call: &mut Call) {
        call.shader = call.shader.edited(&self.file, &self.from, &self.to);
    }
}

/// Runs a case with some of its kernel's calls changed, behind a dispatch that leaves NaN in workgroup
/// memory. `None` where `change` changed none of them.
///
/// # Panics
/// When the driver refuses: a mutant that does not compile shows nothing.
fn run(prepared: &Prepared, device: &Device, variant: &str, change: impl Fn(&mut Call) -> bool) -> Option<Outcome> {
    let (kernel, changed) = (prepared.case().kernel, Cell::new(false));
    let outcome = prepared.run_with(device, variant, |recording| {
        let mut all = poison::poison(device);
        all.append(&recording.changed(|call| {
            if call.shader.kernel == kernel && change(call) {
                changed.set(true);
            }
        }));
        all
    });
    let outcome = outcome.unwrap_or_else(|error| panic!("{kernel}, {}: {error}", prepared.case().name));
    changed.get().then_some(outcome)
}

/// Runs a case with edits of its kernel's shader. `None` where the shader has none of the edited files.
fn run_edited(prepared: &Prepared, device: &Device, variant: &str, edits: &[Edit]) -> Option<Outcome> {
    run(prepared, device, variant, |call| {
        let applies = |edit: &&Edit| call.shader.parts().any(|part| part.name == edit.file);
        let edits: Vec<&Edit> = edits.iter().filter(applies).collect();
        edits.iter().for_each(|edit| edit.break_call(call));
        !edits.is_empty()
    })
}

#[test]
fn an_edit_that_changes_nothing_passes() {
    let edits = [Edit::new("mla_decode", "fn main(", "fn  main("), Edit::new("lib/fold", "fn fold(", "fn  fold(")];
    let prepared = case("mla_decode", &["(150, 2)", "Even"]);
    for device in devices() {
        for variant in (prepared.case().variants)(device.caps()) {
            let outcome = run_edited(&prepared, &device, variant, &edits).expect("both files are in it");
            assert!(outcome.passed, "{}: {outcome:?}", device.caps().label());
        }
    }
    assert!(run_edited(&prepared, &device(), "portable", &[Edit::new("lib/none", "a", "b")]).is_none());
}
