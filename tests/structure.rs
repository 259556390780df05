//! What the documents promise of the sources: four files a kernel, imports in one direction, short files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lamina::kernels::ALL;

/// Files over the limits, with the reason. A flat list may be; a concept that grew too large may not.
const LONG: &[(&str, &str)] = &[];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The files under a folder of the package with that ending, as paths from the package's root.
fn files(folder: &str, ending: &str) -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.expect("the folder can be read").path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    let named =
        |path: &PathBuf| path.strip_prefix(root()).expect("under the root").to_str().expect("UTF-8").replace('\\', "/");
    let mut found: Vec<String> = found.iter().map(named).filter(|path| path.ends_with(ending)).collect();
    found.sort();
    found
}

fn stem(path: &str) -> &str {
    Path::new(path).file_stem().expect("a file").to_str().expect("UTF-8")
}

/// A source file without its comments and without its unit tests.
fn code(path: &str) -> String {
    let all = text(&root().join(path));
    let shipped = all.split("#[cfg(test)]").next().unwrap_or_default();
    shipped.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_kernel_has_four_files_and_a_word_in_each_list() {
    for kernel in ALL.iter().map(|entry| entry.name) {
        for path in [
            format!("shaders/{kernel}.wgsl"),
            format!("src/kernels/{kernel}.rs"),
            format!("src/reference/{kernel}.rs"),
            format!("tests/kernels/{kernel}.rs"),
        ] {
            assert!(root().join(&path).is_file(), "the kernel {kernel} lacks {path}");
        }
        let parity = format!("assert_parity(\"{kernel}\")");
        let test = text(&root().join(format!("tests/kernels/{kernel}.rs")));
        assert!(test.contains(&parity), "tests/kernels/{kernel}.rs does not call {parity}");
        let twin = code(&format!("src/kernels/{kernel}.rs"));
        assert!(twin.contains(&format!("reference::{kernel}::")), "src/kernels/{kernel}.rs does not call its twin");
    }
}

#[test]
fn every_kernel_has_a_cuda_kernel() {
    let list = text(&root().join("tests/cuda/gpu.rs"));
    for kernel in ALL.iter().map(|entry| entry.name) {
        assert!(list.contains(&format!("(\"{kernel}\", &[")), "tests/cuda/gpu.rs lists no CUDA kernel for {kernel}");
    }
}

#[test]
fn every_kernel_has_at_least_eight_cases_and_a_timed_one() {
    use lamina::kernels::Set;
    for kernel in ALL.iter() {
        let cases = (kernel.cases)(Set::Pairs);
        assert!(cases.len() >= 8, "{} has {} cases", kernel.name, cases.len());
        let timed = (kernel.cases)(Set::Timed);
        assert!(timed.iter().any(|case| case.bytes > 0.0), "{} has no timed case that says its bytes", kernel.name);
        for case in cases {
            assert!(case.flops <= 0.5e9, "{}, {}: {} FLOP, over 0.5 G", kernel.name, case.name, case.flops);
        }
    }
}

#[test]
fn no_shader_belongs_to_nobody() {
    let sources: String = files("src", ".rs").iter().map(|path| code(path)).collect();
    for path in files("shaders", ".wgsl") {
        let name = path.strip_prefix("shaders/").and_then(|p| p.strip_suffix(".wgsl")).expect("a shader");
        if name.starts_with("lib/") || name.starts_with("ceilings/") {
            assert!(sources.contains(&format!("wgsl!(\"{name}\")")), "nothing uses {path}");
        } else {
            // A kernel's other shaders, for any matrix units and for many rows.
            let kernel = ["_any", "_rows64"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(ALL.iter().any(|entry| entry.name == kernel), "{path} belongs to no kernel of kernels![...]");
            assert!(sources.contains(&format!("wgsl!(\"{name}\")")), "nothing uses {path}");
        }
    }
}

#[test]
fn no_source_file_is_left_out_of_the_build() {
    for folder in ["src", "tests/kernels"] {
        for path in files(folder, ".rs") {
            let (parent, name) = (Path::new(&path).parent().expect("a folder"), stem(&path));
            if ["lib", "main", "mod"].contains(&name) {
                continue;
            }
            let owners = ["mod.rs", "lib.rs", "main.rs"].map(|owner| root().join(parent).join(owner));
            let owner = owners.iter().find(|owner| owner.is_file()).unwrap_or_else(|| panic!("{path}: no mod.rs"));
            let declares = |line: &str| {
                let line = line.trim().trim_end_matches(',').trim_start_matches("pub ");
                line == format!("mod {name};")
                    || line.starts_with(&format!("{name}::"))
                    || line
                        .split(['[', ']', ','])
                        .any(|word| word.trim() == name || word.trim().starts_with(&format!("{name}::")))
            };
            assert!(text(owner).lines().any(declares), "{path} is in no list of {}", owner.display());
        }
    }
}

#[test]
fn files_are_short() {
    let mut long: Vec<String> = Vec::new();
    for (folder, ending, most) in
        [("shaders", ".wgsl", 300), ("src", ".rs", 500), ("tests", ".rs", 500), ("benches", ".rs", 500)]
    {
        for path in files(folder, ending) {
            let lines = text(&root().join(&path)).lines().count();
            if lines > most && !LONG.iter().any(|(exempt, _)| *exempt == path) {
                long.push(format!("{path}: {lines} lines, of at most {most}"));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
    for (path, _) in LONG {
        assert!(root().join(path).is_file(), "{path} is exempt from the limit, but there is no such file");
    }
}

#[test]
fn a_kernels_head_comment_says_what_grid_lib_and_constants() {
    for path in files("shaders", ".wgsl").iter().filter(|path| !path.contains("/lib/")) {
        let shader = text(&root().join(path));
        let head: Vec<&str> = shader.lines().take_while(|line| line.starts_with("//")).collect();
        let at = |part: &str| {
            let found = head.iter().position(|line| line.starts_with(part));
            found.unwrap_or_else(|| panic!("{path}: its head comment has no line '{part} ...'"))
        };
        let order = [at("// Grid:"), at("// lib:"), at("// Constants:")];
        assert!(order[0] > 0, "{path}: its head comment does not start with what it computes");
        assert!(order.is_sorted(), "{path}: Grid, lib, Constants, in this order");
    }
    for path in files("shaders/lib", ".wgsl") {
        assert!(text(&root().join(&path)).starts_with("//"), "{path}: it does not say what it is");
    }
}

/// The import table of docs/architecture.md: folder, and what it may import.
fn table() -> BTreeMap<String, Vec<String>> {
    let document = text(&root().join("docs/architecture.md"));
    let rows = document.lines().skip_while(|line| !line.starts_with("| folder | may import |")).skip(2);
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>();
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
            (names(cells[0]).remove(0), names(cells[1]))
        })
        .collect()
}

/// What follows `crate::` in the code: the first name, or each first name of a group.
fn imports(code: &str) -> Vec<String> {
    let word = |text: &str| text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for rest in code.split("crate::").skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            found.push(word(rest));
            continue;
        };
        let (mut depth, mut item) = (1, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                found.push(word(&std::mem::take(&mut item)));
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn imports_follow_the_table_of_the_architecture_document() {
    let table = table();
    let mut wrong = Vec::new();
    for path in files("src", ".rs") {
        let folder = path.split('/').nth(1).expect("under src").trim_end_matches(".rs");
        if ["lib", "main"].contains(&folder) {
            continue;
        }
        let Some(allowed) = table.get(folder) else {
            wrong.push(format!("docs/architecture.md: the import table has no row for src/{folder}"));
            continue;
        };
        for import in imports(&code(&path)) {
            let import = match import.as_str() {
                "Error" | "Result" => "error",
                // Macros at the root: `params!` and `wgsl!` are part of kernels and gpu.
                "params" => "kernels",
                "wgsl" => "gpu",
                other => other,
            };
            if import != folder && !allowed.iter().any(|name| name == import) {
                wrong.push(format!("{path} imports {import}, which the table does not allow"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for folder in table.keys() {
        let exists = root().join("src").join(folder).is_dir() || root().join(format!("src/{folder}.rs")).is_file();
        assert!(exists, "docs/architecture.md: the import table has a row for src/{folder}, which is not there");
    }
}

#[test]
fn only_the_gpu_folder_names_wgpu() {
    for path in files("src", ".rs").iter().filter(|path| !path.starts_with("src/gpu/")) {
        assert!(!code(path).contains("wgpu::"), "{path} names a wgpu type");
    }
}

#[test]
fn the_bindgen_tool_has_the_version_of_the_lock_file() {
    let version = |path: &str, package: &str| {
        let lock = text(&root().join(path));
        let rest = lock.split(&format!("name = \"{package}\"\nversion = \"")).nth(1).expect("the lock names it");
        rest.split('"').next().expect("a version").to_string()
    };
    let tool = version("demos/bindgen/Cargo.lock", "wasm-bindgen-cli-support");
    assert_eq!(version("Cargo.lock", "wasm-bindgen"), tool, "wasm-bindgen and demos/bindgen");
}

#[test]
fn an_import_is_found_in_every_form() {
    let code = "use crate::gpu::{Caps, View};\nuse crate::{Error, kernels::{ALL, Set}, num};\nlet x = crate::check::y;";
    assert_eq!(imports(code), ["gpu", "Error", "kernels", "num", "check"]);
}

/// The words of a command; what stands in quotes is one.
fn words(command: &str) -> Vec<&str> {
    let parts = command.split('"').enumerate();
    parts.flat_map(|(i, part)| if i % 2 == 1 { vec![part] } else { part.split_whitespace().collect() }).collect()
}

#[test]
fn the_readme_s_links_and_commands_exist() {
    for document in ["README.md", "docs/architecture.md", "docs/kernels.md", "docs/cli.md", "docs/web.md"] {
        let text = text(&root().join(document));
        let folder = root().join(document).parent().expect("a folder").to_path_buf();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with("http") {
                assert!(folder.join(target).exists(), "{document} links to {target}");
            }
        }
    }
    let readme = text(&root().join("README.md"));
    let lines = readme.lines().map(|line| line.strip_prefix("$ ").unwrap_or(line));
    for line in lines.filter(|line| ["tests/", "cargo ", "lamina "].iter().any(|start| line.starts_with(start))) {
        let command = line.split('#').next().unwrap_or_default().trim();
        let arguments = command.strip_prefix("cargo run --release -- ").or(command.strip_prefix("lamina "));
        if command.starts_with("tests/") {
            assert!(root().join(command).is_file(), "{command}");
        } else if command == "cargo install --path ." {
            assert!(root().join("src/main.rs").is_file(), "{command}: there is nothing to install");
        } else if let Some(arguments) = arguments {
            let lamina = std::process::Command::new(env!("CARGO_BIN_EXE_lamina"))
                .args(words(arguments))
                .arg("--help")
                .output()
                .expect("lamina starts");
            assert!(lamina.status.success(), "{command}: {}", String::from_utf8_lossy(&lamina.stderr));
        } else {
            assert!(command.starts_with("cargo bench --bench kernels -- "), "{command}: an unknown command");
        }
    }
}
