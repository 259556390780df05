//! `bindgen IN.wasm OUT_DIR NAME`: the JavaScript side of a WebAssembly module.

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, out, name] = arguments.as_slice() else {
        eprintln!("usage: bindgen IN.wasm OUT_DIR NAME");
        std::process::exit(2);
    };
    let mut bindgen = wasm_bindgen_cli_support::Bindgen::new();
    let made = bindgen.input_path(input).out_name(name).typescript(true).web(true).and_then(|b| b.generate(out));
    if let Err(error) = made {
        eprintln!("{input}: {error:?}");
        std::process::exit(1);
    }
}
