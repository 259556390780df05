//! A model's rope: from the fields of its configuration to frequencies.
//!
//! The rules are those of transformers 5.23.0, `modeling_rope_utils.py`.

use super::fields::Fields;
use crate::Result;
use crate::num::rope::{Frequencies, RopeLayout, Yarn};

/// How the rope parts of queries and keys turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Elements that turn (`qk_rope_head_dim`).
    pub width: u32,
    /// Which elements turn together.
    pub layout: RopeLayout,
    /// The base of the frequencies (`rope_theta`).
    pub theta: f64,
    /// How the context was extended.
    pub scaling: Scaling,
    /// Factor of each cosine and sine, where it is not the scaling's own.
    pub attention: Option<f64>,
}

/// How a context was extended.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    Plain,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// YaRN.
    Yarn(Yarn),
    /// A divisor for each frequency.
    Longrope {
        /// For contexts up to `original_length`.
        short: Vec<f64>,
        /// For longer ones.
        long: Vec<f64>,
        /// By how much the context grew; the attention factor follows from it.
        growth: f64,
        /// The context before that.
        original_length: f64,
    },
}

/// What the rope's fields say beside the rope itself.
pub(super) struct Read {
    pub(super) rope: Rope,
    /// Factor of the softmax scale.
    pub(super) softmax_factor: f64,
    /// `llama_4_scaling_beta` and `original_max_position_embeddings`.
    pub(super) growth: Option<(f64, u32)>,
}

/// What a family fixes of its rope.
pub(super) struct Fixed {
    pub(super) width: u32,
    /// What `partial_rotary_factor` is a part of.
    pub(super) whole: u32,
    pub(super) layout: RopeLayout,
    /// Where the file names no `rope_theta`.
    pub(super) theta: f64,
    /// Whether queries grow with the position.
    pub(super) growth: bool,
}

/// The largest context that may be asked for.
pub(super) const MOST: u32 = 1 << 30;

impl Rope {
    /// The frequencies for contexts of up to `context` tokens. Longrope alone takes notice of it, and
    /// turns every position by the list for that context, as the models were trained.
    pub fn frequencies(&self, context: u32) -> Frequencies {
        let (p, theta) = (self.width, self.theta);
        let mut frequencies = match &self.scaling {
            Scaling::Plain => Frequencies::plain(p, theta),
            Scaling::Linear { factor } => Frequencies::linear(p, theta, *factor),
            Scaling::Yarn(yarn) => Frequencies::yarn(p, theta, yarn),
            Scaling::Longrope { short, long, growth, original_length } => {
                let factors = if f64::from(context) > *original_length { long } else { short };
                Frequencies::longrope(p, theta, factors, growth * original_length, *original_length)
            }
        };
        frequencies.attention = self.attention.unwrap_or(frequencies.attention);
        frequencies
    }
}

/// Reads `rope_theta`, `rope_scaling` and `rope_parameters`.
pub(super) fn read(fields: &Fields, fixed: &Fixed) -> Result<Read> {
    let whole = fields.count("max_position_embeddings", 1, MOST)?;
    let name = ["rope_scaling", "rope_parameters"].into_iter().find(|name| fields.get(name).is_some());
    let path = fields.path_of(name.unwrap_or("rope_parameters"));
    let empty = serde_json::json!({});
    let inner = Fields::new(fields.file(), &path, name.and_then(|name| fields.get(name)).unwrap_or(&empty))?;
    known(&inner, fixed.growth)?;

    let theta = match (inner.number_or_none("rope_theta")?, fields.number_or_none("rope_theta")?) {
        (Some(one), Some(two)) if one != two => {
            return Err(inner.wrong("rope_theta", &format!("{two}, as outside of it"), &one.to_string()));
        }
        (one, two) => one.or(two).unwrap_or(fixed.theta),
    };
    if theta <= 1.0 {
        return Err(fields.wrong("rope_theta", "a number above 1", &theta.to_string()));
    }
    for from in [&inner, fields] {
        let part = from.number_or_none("partial_rotary_factor")?;
        if let Some(part) = part.filter(|part| (f64::from(fixed.whole) * part + 1e-6).floor() != f64::from(fixed.width))
        {
            let right = f64::from(fixed.width) / f64::from(fixed.whole);
            return Err(from.wrong("partial_rotary_factor", &format!("{right}, as the widths say"), &part.to_string()));
        }
    }

    let kinds = ["default", "linear", "yarn", "longrope"];
    let (kind, old) = (inner.one_of("rope_type", &kinds)?, inner.one_of("type", &kinds)?);
    if let Some((kind, old)) = kind.zip(old).filter(|(kind, old)| kind != old) {
        return Err(inner.wrong("type", &format!("'{kind}', as rope_type"), &format!("'{old}'")));
    }
    let kind = kind.or(old).unwrap_or("default");
    let original = || {
        let outer = fields.count_or_none("original_max_position_embeddings", 2, MOST)?;
        let inner = inner.count_or_none("original_max_position_embeddings", 2, MOST)?;
        Ok::<u32, crate::Error>(outer.or(inner).unwrap_or(whole))
    };
    let mut attention = inner.number_or_none("attention_factor")?;
    let mut softmax_factor = 1.0;
    let scaling = match kind {
        "linear" => Scaling::Linear { factor: inner.number("factor")? },
        "yarn" => {
            let nonzero = |weight: Option<f64>| weight.filter(|weight| *weight > 0.0);
            let (mscale, all_dim) =
                (nonzero(inner.weight_or_none("mscale")?), nonzero(inner.weight_or_none("mscale_all_dim")?));
            let yarn = Yarn {
                factor: inner.number("factor")?,
                original_length: f64::from(original()?),
                beta_fast: inner.number_or_none("beta_fast")?.unwrap_or(32.0),
                beta_slow: inner.number_or_none("beta_slow")?.unwrap_or(1.0),
                mscale: mscale.unwrap_or(1.0),
                mscale_all_dim: all_dim.unwrap_or(0.0),
            };
            // The two weights count together or not at all.
            if mscale.is_none() || all_dim.is_none() {
                attention = attention.or(Some(yarn.magnitude(1.0)));
            }
            softmax_factor = all_dim.map_or(1.0, |weight| yarn.magnitude(weight).powi(2));
            Scaling::Yarn(yarn)
        }
        "longrope" => {
            let pairs = (fixed.width / 2) as usize;
            let original = original()?;
            let growth = inner.number_or_none("factor")?.unwrap_or(f64::from(whole) / f64::from(original));
            let (short, long) = (inner.numbers("short_factor", pairs)?, inner.numbers("long_factor", pairs)?);
            Scaling::Longrope { short, long, growth, original_length: f64::from(original) }
        }
        _ => Scaling::Plain,
    };
    if scaling == Scaling::Plain {
        let extra = ["factor", "short_factor", "mscale_all_dim"].into_iter().find(|name| inner.get(name).is_some());
        if let Some(extra) = extra {
            return Err(inner.wrong("rope_type", &format!("a type that takes {extra}"), "no rope type or 'default'"));
        }
    } else if kind != "yarn" && inner.get("mscale_all_dim").is_some() {
        return Err(inner.wrong("mscale_all_dim", "no such field with this rope type", "a number"));
    }
    let growth = match fixed.growth {
        true => Some((inner.weight("llama_4_scaling_beta")?, original()?)),
        false => None,
    };
    let rope = Rope { width: fixed.width, layout: fixed.layout, theta, scaling, attention };
    Ok(Read { rope, softmax_factor, growth })
}

/// Refuses fields that lamina does not know: they would change the angles.
fn known(inner: &Fields, growth: bool) -> Result<()> {
    const KNOWN: [&str; 15] = [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "short_factor",
        "long_factor",
        "partial_rotary_factor",
        "truncate",
        "max_position_embeddings",
    ];
    inner.always("truncate", true)?;
    for key in inner.keys().filter(|key| inner.get(key).is_some()) {
        let fits = KNOWN.contains(&key.as_str()) || growth && key == "llama_4_scaling_beta";
        if !fits {
            return Err(inner.wrong(key, "no such field", "one that lamina does not know"));
        }
    }
    Ok(())
}
