//! Specialising a kernel: prelude, modules and the unedited kernel file, one after the other.
//!
//! WGSL's module scope is free of order, so composing is concatenating: `enable` lines,
//! constants, aliases, the chosen `shaders/lib/` modules, then the kernel file. The composed
//! text keeps marks, so that a compiler's message names the shader file's own line.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use super::caps::MatrixUnits;

/// A WGSL file of this package: its name without ending, and its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The path under `shaders/`, without `.wgsl`: `gemv`, `lib/weights_f16`.
    pub name: &'static str,
    /// The file's text.
    pub text: &'static str,
}

/// The kernel file `shaders/NAME.wgsl`, or with a path under `shaders/` a module, as a [`Source`].
#[macro_export]
macro_rules! wgsl {
    ($name:literal) => {
        $crate::gpu::Source {
            name: $name,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $name, ".wgsl")),
        }
    };
}

/// Language extensions that a shader needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions {
    /// `enable f16;`
    pub f16: bool,
    /// Subgroup operations; browsers want `enable subgroups;`, naga rejects that line.
    pub subgroups: bool,
    /// `enable wgpu_cooperative_matrix;`, natively only.
    pub cooperative_matrix: bool,
    /// No `enable`: a hint to leave its loops as they are, where the driver can be told so.
    pub rolled: bool,
}

/// Who parses the composed text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// naga, on every native backend.
    Naga,
    /// A browser's own compiler.
    Browser,
}

impl Dialect {
    /// The one of this build.
    pub const HERE: Dialect = if cfg!(target_arch = "wasm32") { Dialect::Browser } else { Dialect::Naga };
}

/// A specialised kernel, ready to be compiled. Two shaders of one key are the same text.
#[derive(Clone, Debug)]
pub struct Shader {
    /// The kernel's name.
    pub kernel: &'static str,
    /// What it needs of the language.
    pub extensions: Extensions,
    source: Source,
    constants: Vec<(&'static str, String)>,
    aliases: Vec<(&'static str, &'static str)>,
    modules: Vec<Source>,
    bindings: Vec<Declared>,
    edits: Vec<Edit>,
    key: String,
}

/// One text of one file, replaced: see [`Shader::edited`].
#[derive(Clone, Debug)]
struct Edit {
    file: String,
    from: String,
    to: String,
}

/// Collects the parts of a [`Shader`].
pub struct ShaderBuilder(Shader);

impl Shader {
    /// Starts from a kernel file.
    pub fn of(source: Source) -> ShaderBuilder {
        ShaderBuilder(Shader {
            // A kernel's other shaders, for any matrix units and for many rows, are the same kernel.
            kernel: ["_any", "_rows64"].iter().find_map(|end| source.name.strip_suffix(end)).unwrap_or(source.name),
            extensions: Extensions::default(),
            source,
            constants: Vec::new(),
            aliases: Vec::new(),
            modules: Vec::new(),
            bindings: source.text.lines().filter_map(Declared::parse).collect(),
            edits: Vec::new(),
            key: String::new(),
        })
    }

    /// The variant key: the kernel with everything that specialises it.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The whole text for one parser.
    pub fn compose(&self, dialect: Dialect) -> Composed {
        let mut head = String::new();
        if self.extensions.f16 {
            head.push_str("enable f16;\n");
        }
        if self.extensions.subgroups && dialect == Dialect::Browser {
            head.push_str("enable subgroups;\n");
        }
        if self.extensions.cooperative_matrix {
            head.push_str("enable wgpu_cooperative_matrix;\n");
        }
        for (name, value) in &self.constants {
            let _ = writeln!(head, "const {name} = {value};");
        }
        for (name, kind) in &self.aliases {
            let _ = writeln!(head, "alias {name} = {kind};");
        }
        let mut composed = Composed { text: String::new(), marks: Vec::new() };
        composed.push(&format!("prelude of {}", self.source.name), &head);
        for part in self.parts() {
            composed.push(&format!("shaders/{}.wgsl", part.name), &self.text_of(part));
        }
        composed
    }

    /// A copy with the text `from` of the file `file` (such as `lib/fold`) replaced by `to`, under a key of
    /// its own: a broken kernel, with which the parity harness is itself tested. Its bindings stay those of
    /// the kernel file.
    ///
    /// # Panics
    /// When the shader has no such file, or the file does not hold `from` exactly once.
    pub fn edited(&self, file: &str, from: &str, to: &str) -> Arc<Shader> {
        let part = self.parts().find(|part| part.name == file);
        let part = part.unwrap_or_else(|| panic!("{} is not made of '{file}'", self.key));
        let times = self.text_of(part).matches(from).count();
        assert!(times == 1, "{file}.wgsl holds {from:?} {times} times, not once");
        let mut shader = self.clone();
        let _ = write!(shader.key, " {file}: {from:?} -> {to:?}");
        shader.edits.push(Edit { file: file.to_string(), from: from.to_string(), to: to.to_string() });
        Arc::new(shader)
    }

    /// The modules, then the kernel file.
    pub fn parts(&self) -> impl Iterator<Item = &Source> {
        self.modules.iter().chain([&self.source])
    }

    fn text_of(&self, part: &Source) -> Cow<'static, str> {
        let edits = self.edits.iter().filter(|edit| edit.file == part.name);
        edits.fold(part.text.into(), |text, edit| text.replacen(&edit.from, &edit.to, 1).into())
    }

    /// The bindings that the kernel file declares, in its order.
    pub fn bindings(&self) -> &[Declared] {
        &self.bindings
    }
}

impl ShaderBuilder {
    /// Adds `const NAME: u32`.
    pub fn u32(mut self, name: &'static str, value: u32) -> Self {
        self.0.constants.push((name, format!("{value}u")));
        self
    }

    /// Adds `const NAME: bool`.
    pub fn bool(mut self, name: &'static str, value: bool) -> Self {
        self.0.constants.push((name, value.to_string()));
        self
    }

    /// Adds `alias NAME = KIND;`.
    pub fn alias(mut self, name: &'static str, kind: &'static str) -> Self {
        self.0.aliases.push((name, kind));
        self
    }

    /// For matrix units and subgroups of one kind: `U` and `WIDTH`, the fragments `Rows` and `Tokens` of f16 and `Sums`
    /// of f32, and what they need of a device.
    ///
    /// # Panics
    /// For a size that [`super::Caps::matrix_size`] does not give.
    pub fn fragments(self, units: MatrixUnits) -> Self {
        let [rows, tokens, sums] = match units.size {
            8 => ["coop_mat8x8<f16, A>", "coop_mat8x8<f16, B>", "coop_mat8x8<f32, C>"],
            16 => ["coop_mat16x16<f16, A>", "coop_mat16x16<f16, B>", "coop_mat16x16<f32, C>"],
            size => panic!("matrix units of {size}"),
        };
        let types = self.alias("Rows", rows).alias("Tokens", tokens).alias("Sums", sums);
        types.u32("U", units.size).u32("WIDTH", units.width).f16().subgroups().cooperative_matrix()
    }

    /// Adds a module.
    pub fn module(mut self, module: Source) -> Self {
        self.0.modules.push(module);
        self
    }

    /// Enables f16 arithmetic.
    pub fn f16(mut self) -> Self {
        self.0.extensions.f16 = true;
        self
    }

    /// Enables subgroup operations.
    pub fn subgroups(mut self) -> Self {
        self.0.extensions.subgroups = true;
        self
    }

    /// Enables matrix units.
    pub fn cooperative_matrix(mut self) -> Self {
        self.0.extensions.cooperative_matrix = true;
        self
    }

    /// Asks the driver to leave its loops as they are.
    pub fn rolled(mut self) -> Self {
        self.0.extensions.rolled = true;
        self
    }

    /// The finished shader.
    pub fn build(mut self) -> Arc<Shader> {
        let Shader { kernel, constants, aliases, modules, extensions, .. } = &self.0;
        let mut key = kernel.to_string();
        for (name, value) in constants {
            let _ = write!(key, " {name}={}", value.trim_end_matches('u'));
        }
        for (name, kind) in aliases {
            let _ = write!(key, " {name}={kind}");
        }
        for module in modules {
            let _ = write!(key, " {}", module.name.trim_start_matches("lib/"));
        }
        let Extensions { f16, subgroups, cooperative_matrix, rolled } = *extensions;
        let all = [(f16, "f16"), (subgroups, "subgroups"), (cooperative_matrix, "coop"), (rolled, "rolled")];
        for (on, name) in all {
            if on {
                let _ = write!(key, " +{name}");
            }
        }
        self.0.key = key;
        Arc::new(self.0)
    }
}

/// A composed text, and where its lines come from.
#[derive(Debug)]
pub struct Composed {
    /// What the compiler gets.
    pub text: String,
    /// The first line of each part, from 1, and the part's file.
    marks: Vec<(usize, String)>,
}

impl Composed {
    fn push(&mut self, file: &str, text: &str) {
        let line = self.text.lines().count() + 1;
        self.marks.push((line, file.to_string()));
        self.text.push_str(text);
        if !text.is_empty() && !text.ends_with('\n') {
            self.text.push('\n');
        }
    }

    /// The file and the line in it, from 1, that line `line` of the text came from.
    pub fn locate(&self, line: usize) -> (&str, usize) {
        let at = self.marks.iter().rposition(|(first, _)| *first <= line.max(1)).unwrap_or(0);
        let (first, file) = &self.marks[at];
        (file, line.max(1) - first + 1)
    }
}

/// A binding as the kernel file declares it, one a line:
/// `@group(0) @binding(1) var<storage, read> x: array<f32>;`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Its number in group 0.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What the kernel does with it.
    pub access: Access,
}

/// The address space and access of a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `var<uniform>`: the parameters.
    Uniform,
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

impl Declared {
    fn parse(line: &str) -> Option<Declared> {
        let rest = line.trim_start().strip_prefix("@group(0) @binding(")?;
        let (index, rest) = rest.split_once(')')?;
        let (kind, rest) = rest.trim_start().strip_prefix("var<")?.split_once('>')?;
        let access = match kind.replace(' ', "").as_str() {
            "uniform" => Access::Uniform,
            "storage,read" | "storage" => Access::Read,
            "storage,read_write" => Access::ReadWrite,
            _ => return None,
        };
        let name = rest.split_once(':')?.0.trim().to_string();
        Some(Declared { index: index.trim().parse().ok()?, name, access })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: Source = Source {
        name: "toy",
        text: "// toy\n@group(0) @binding(0) var<uniform> params: Params;\n\
               @group(0) @binding(1) var<storage, read> x: array<f32>; // [n] f32\n\
               @group(0) @binding(2) var<storage, read_write> y: array<Word>;\n",
    };
    const MODULE: Source = Source { name: "lib/part", text: "fn part() {}\nfn other() {}" };

    #[test]
    fn a_line_of_the_composed_text_is_found_in_its_file() {
        let shader = Shader::of(KERNEL).u32("N", 3).alias("Word", "vec4<u32>").module(MODULE).f16().build();
        let composed = shader.compose(Dialect::Naga);
        let line_of = |part: &str| composed.text.lines().position(|l| l.contains(part)).expect(part) + 1;
        assert_eq!(composed.locate(line_of("fn other")), ("shaders/lib/part.wgsl", 2));
        assert_eq!(composed.locate(line_of("x: array")), ("shaders/toy.wgsl", 3));
        assert_eq!(composed.locate(line_of("const N = 3u;")).0, "prelude of toy");
        assert_eq!(shader.key(), "toy N=3 Word=vec4<u32> part +f16");
    }

    #[test]
    fn an_edited_shader_differs_in_one_text_and_its_key() {
        let shader = Shader::of(KERNEL).module(MODULE).build();
        let edited = shader.edited("lib/part", "other()", "another()").edited("toy", "// toy", "// played");
        let texts = [&shader, &edited].map(|s| s.compose(Dialect::Naga).text);
        assert_eq!(texts[0].replace("other()", "another()").replace("// toy", "// played"), texts[1]);
        assert_ne!(shader.key(), edited.key());
        let refused = |file: &str, from: &str| std::panic::catch_unwind(|| shader.edited(file, from, "")).is_err();
        assert!(refused("lib/part", "absent") && refused("lib/part", "fn ") && refused("lib/none", "fn part"));
    }

    #[test]
    fn only_browsers_get_the_subgroup_line() {
        let shader = Shader::of(KERNEL).subgroups().build();
        assert!(!shader.compose(Dialect::Naga).text.contains("enable subgroups"));
        assert!(shader.compose(Dialect::Browser).text.contains("enable subgroups;"));
    }

    #[test]
    fn declared_bindings_are_read_from_the_kernel_file() {
        let shader = Shader::of(KERNEL).build();
        let names: Vec<_> = shader.bindings().iter().map(|d| (d.index, d.name.clone(), d.access)).collect();
        let expected = [(0, "params", Access::Uniform), (1, "x", Access::Read), (2, "y", Access::ReadWrite)];
        assert_eq!(names, expected.map(|(i, n, a)| (i, n.to_string(), a)));
    }
}
