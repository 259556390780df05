//! Chat templates: Jinja, with what Hugging Face transformers gives them (`chat_template_utils.py`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value as Json};
use web_time::{SystemTime, UNIX_EPOCH};

use super::{files, json};
use crate::{Error, Result};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`, or what else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of a role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    /// What the model is to be.
    pub fn system(content: impl Into<String>) -> Message {
        Message::new("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Message {
        Message::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message::new("assistant", content)
    }

    /// The object that templates see.
    pub fn to_json(&self) -> Json {
        serde_json::json!({"role": self.role, "content": self.content})
    }
}

/// What a template gets besides the messages.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// Ends the prompt with the start of the model's answer.
    pub add_generation_prompt: bool,
    /// Descriptions of tools the model may call, as JSON schemas.
    pub tools: Option<Json>,
    /// Further variables of the model's own template, such as `enable_thinking`.
    pub variables: Map<String, Json>,
}

impl Default for ChatOptions {
    fn default() -> ChatOptions {
        ChatOptions { add_generation_prompt: true, tools: None, variables: Map::new() }
    }
}

/// A model's chat template. Clones share it.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    file: PathBuf,
    environment: Arc<Environment<'static>>,
    /// `bos_token` and the like.
    tokens: Map<String, Json>,
}

/// The template's name in its environment, and in its messages.
const NAME: &str = "chat_template";
/// The template that is taken where tools are given and there are several.
const TOOLS: &str = "tool_use";

impl ChatTemplate {
    /// The template of a folder: `chat_template.jinja`, else `chat_template` in `chat_template.json`, else in
    /// `config`, the object of `tokenizer_config.json`. `None` where there is none.
    ///
    /// # Errors
    /// Names the file, and the line that does not parse.
    pub fn load(folder: &Path, config: &Map<String, Json>) -> Result<Option<ChatTemplate>> {
        let jinja = folder.join("chat_template.jinja");
        if let Some(text) = files::text(&jinja)? {
            return Ok(Some(ChatTemplate::new(&jinja, &Json::String(text), config)?));
        }
        let own = folder.join("chat_template.json");
        if let Some(template) = files::object(&own)?.get("chat_template") {
            return Ok(Some(ChatTemplate::new(&own, template, config)?));
        }
        let template = config.get("chat_template").filter(|template| !template.is_null());
        let load = |template| ChatTemplate::new(&folder.join("tokenizer_config.json"), template, config);
        template.map(load).transpose()
    }

    /// Parses a template: a text, or a list of objects with `name` and `template`, of which `default` counts,
    /// and `tool_use` where tools are given. `file` is for messages.
    ///
    /// # Errors
    /// Names the file, and the line that does not parse.
    pub fn new(file: &Path, template: &Json, config: &Map<String, Json>) -> Result<ChatTemplate> {
        let invalid = |expected: &str, found: String| {
            let (what, expected) = (NAME.to_string(), expected.to_string());
            Error::Invalid { file: file.to_path_buf(), what, expected, found }
        };
        let named = |entry: &Json| Some((entry["name"].as_str()?.to_string(), entry["template"].as_str()?.to_string()));
        let expected = "a template, or a list of named ones with one named default";
        let templates = match template {
            Json::String(text) => Some(vec![("default".to_string(), text.clone())]),
            Json::Array(entries) => entries.iter().map(named).collect(),
            _ => None,
        };
        let templates = templates.ok_or_else(|| invalid(expected, template.to_string()))?;
        if !templates.iter().any(|(name, _)| name == "default") {
            return Err(invalid(expected, template.to_string()));
        }
        let mut environment = environment();
        for (name, text) in templates {
            let name = if name == "default" { NAME.to_string() } else { name };
            let added = environment.add_template_owned(name, without_generation(&text));
            added.map_err(|error| invalid("a Jinja template", explain(&error)))?;
        }
        let token = |(name, _): (&String, &Json)| {
            let text = files::token(config, name).filter(|_| name.ends_with("_token"))?;
            Some((name.clone(), text.into()))
        };
        let tokens = config.iter().filter_map(token).collect();
        Ok(ChatTemplate { file: file.to_path_buf(), environment: Arc::new(environment), tokens })
    }

    /// The prompt of a conversation. Messages are objects with `role` and `content`, or what else the
    /// template reads, such as `tool_calls`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the template's own words where it refuses the messages (`raise_exception`).
    pub fn render(&self, messages: &[Json], options: &ChatOptions) -> Result<String> {
        let mut context = self.tokens.clone();
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), options.tools.clone().unwrap_or_default());
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        context.extend(options.variables.clone());
        let context = Value::from(Serde(context));
        let tools = options.tools.as_ref().and_then(|_| self.environment.get_template(TOOLS).ok());
        let rendered = match tools {
            Some(template) => template.render(context.clone()),
            None => self.environment.get_template(NAME).and_then(|template| template.render(context.clone())),
        };
        rendered.map_err(|error| Error::Invalid {
            file: self.file.clone(),
            what: NAME.into(),
            expected: "messages that it takes".into(),
            found: explain(&error),
        })
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    // A template that never ends is an error. The longest known takes a few thousand steps for a message.
    environment.set_fuel(Some(50_000_000));
    // A prompt is plain text, whatever the template is named.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Jinja<Value> { fail(message) });
    environment.add_function("strftime_now", |format: String| strftime(&format, now()));
    environment.add_filter("tojson", tojson);
    environment
}

type Jinja<T> = std::result::Result<T, minijinja::Error>;

fn fail<T>(message: impl Into<std::borrow::Cow<'static, str>>) -> Jinja<T> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The reason and the line.
fn explain(error: &minijinja::Error) -> String {
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    error.line().map_or(reason.clone(), |line| format!("{reason} (line {line})"))
}

/// transformers' `tojson`: no escapes for HTML, Python's spaces.
fn tojson(value: Value, options: Kwargs) -> Jinja<String> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    // What else json.dumps takes has no use in a prompt, and an unknown name is a mistake.
    options.assert_all_used()?;
    let text = json::dumps(&value, indent).or_else(|error| fail(error.to_string()))?;
    if ascii != Some(true) {
        return Ok(text);
    }
    let mut escaped = String::new();
    for unit in text.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("\\u{unit:04x}")),
        }
    }
    Ok(escaped)
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A time in UTC, in the words of C's `strftime`.
fn strftime(format: &str, seconds: u64) -> Jinja<String> {
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    match time.map(|time| jiff::fmt::strtime::format(format, time)) {
        Some(Ok(text)) => Ok(text),
        Some(Err(error)) => fail(format!("strftime_now: '{format}': {error}")),
        None => fail(format!("strftime_now: {seconds} seconds since 1970 are no date")),
    }
}

/// `{% generation %}` marks the model's words for training; in a prompt it is an empty block.
fn without_generation(template: &str) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{%") {
        let Some((tag, behind)) = after.split_once("%}") else { break };
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let tag = match word {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_string(),
        };
        out.push_str(&format!("{before}{{%{tag}%}}"));
        rest = behind;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(text: &str) -> ChatTemplate {
        let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let text = Json::String(text.into());
        ChatTemplate::new("chat_template.jinja".as_ref(), &text, config.as_object().unwrap()).unwrap()
    }

    fn render(text: &str, messages: Json, options: &ChatOptions) -> String {
        template(text).render(messages.as_array().unwrap(), options).unwrap()
    }

    fn talk() -> Json {
        json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " Hi "},
            {"role": "assistant", "content": "<think>greet</think>\n\nHello"},
            {"role": "user", "content": "Bye"}
        ])
    }

    #[test]
    fn chatml_as_in_minicpm_and_qwen() {
        let text = "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0].content + \
            '<|im_end|>\\n' }}\n{%- endif %}\n{%- set ns = namespace(last=messages|length - 1, found=false) %}\n\
            {%- for message in messages[::-1] %}\n    {%- if message.role == 'user' and not ns.found %}\n\
            {%- set ns.last = messages|length - 1 - loop.index0 %}{% set ns.found = true %}\n    {%- endif %}\n{%- endfor %}\n\
            {%- for message in messages %}\n    {%- if message.role == 'system' %}{% continue %}{% endif %}\n\
            {%- set content = message.content %}\n    {%- if '</think>' in content and loop.index0 < ns.last %}\n\
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n\
            {{- '<|im_start|>' + message.role + '\\n' + content.strip() + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n\
            {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n\
            {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n\
            {%- endif %}\n{%- endif %}\n";
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\
            Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render(text, talk(), &ChatOptions::default()), expected);
        let variables = json!({"enable_thinking": false}).as_object().unwrap().clone();
        let options = ChatOptions { variables, ..ChatOptions::default() };
        assert_eq!(render(text, talk(), &options), format!("{expected}<think>\n\n</think>\n\n"));
        let options = ChatOptions { add_generation_prompt: false, ..ChatOptions::default() };
        assert!(render(text, talk(), &options).ends_with("Bye<|im_end|>\n"));
    }

    #[test]
    fn tools_and_parts_of_content_as_in_glm_and_kimi() {
        let text = "[gMASK]<sop>\n{%- if tools -%}\n<|system|>\n{% for tool in tools %}\n{{ tool | tojson(ensure_ascii=False) }}\n\
            {% endfor %}\n{%- endif -%}\n{%- macro visible(content) -%}\n    {%- if content is string -%}\n{{- content }}\n\
            {%- elif content is iterable and content is not mapping -%}\n        {%- for item in content -%}\n\
            {%- if item is mapping and item.type == 'text' -%}\n{{- item.text }}\n{%- endif -%}\n\
            {%- endfor -%}\n    {%- endif -%}\n{%- endmacro -%}\n{%- for m in messages -%}\n\
            {%- if m.role == 'user' -%}<|user|>\n{{ visible(m.content) }}\n{%- elif m.tool_calls -%}\n\
            {%- for call in m.tool_calls -%}<tool_call>{{ call.function.name }}\n{% for k, v in call.function.arguments.items() -%}\n\
            {{ k }}={{ v | tojson if v is not string else v }};{%- endfor -%}\n{%- endfor -%}\n{%- endif -%}\n{%- endfor -%}\n";
        let messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "é"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f",
                "arguments": {"z": [1, 2], "a": "s"}}}]}
        ]);
        let tools = Some(json!([{"type": "function", "name": "ö<b>", "n": 1}]));
        let options = ChatOptions { tools, ..ChatOptions::default() };
        let rendered = render(text, messages, &options);
        let start = "[gMASK]<sop><|system|>\n{\"type\": \"function\", \"name\": \"ö<b>\", \"n\": 1}\n";
        assert!(rendered.starts_with(start), "{rendered}");
        assert!(rendered.contains("<|user|>\naé<tool_call>f\n"), "{rendered}");
        assert!(rendered.contains("z=[1, 2];") && rendered.contains("a=s;"), "{rendered}");
    }

    #[test]
    fn special_tokens_string_methods_and_generation_blocks() {
        let text = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
            {% endgeneration %}{{ eos_token }}{% elif m.content.startswith('B') %}[{{ m.content.upper() }}]{% endif %}\
            {% endfor %}";
        let rendered = render(text, talk(), &ChatOptions::default());
        assert_eq!(rendered, "<s>[BE BRIEF.]<think>greet</think>\n\nHello</s>[BYE]");
    }

    #[test]
    fn a_template_that_never_ends_is_refused() {
        let endless = template("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}");
        let error = endless.render(talk().as_array().unwrap(), &ChatOptions::default()).unwrap_err().to_string();
        assert!(error.starts_with("chat_template.jinja: "), "{error}");
        assert!(error.contains("ran out of fuel"), "{error}");
        // A long conversation is far from it.
        let many: Vec<Json> = (0..20_000).map(|_| json!({"role": "user", "content": "Hi"})).collect();
        let each = template("{% for m in messages %}{{ m.role + m.content }}{% endfor %}");
        assert_eq!(each.render(&many, &ChatOptions::default()).unwrap().len(), 120_000);
    }

    #[test]
    fn a_template_s_own_refusal_and_a_fault_in_it_are_told() {
        let refusing = template("{% if true %}\n{{ raise_exception('Roles must alternate') }}\n{% endif %}");
        let error = refusing.render(&[], &ChatOptions::default()).unwrap_err().to_string();
        assert!(error.starts_with("chat_template.jinja: chat_template: expected messages that it takes"), "{error}");
        assert!(error.contains("Roles must alternate (line 2)"), "{error}");
        let broken = ChatTemplate::new("t.json".as_ref(), &json!("a\n{% if %}"), &Map::new()).unwrap_err().to_string();
        assert!(broken.starts_with("t.json: chat_template: expected a Jinja template, found"), "{broken}");
        assert!(broken.contains("line 2"), "{broken}");
        for bad in [json!(3), json!([{"name": "other", "template": ""}])] {
            assert!(ChatTemplate::new("t.json".as_ref(), &bad, &Map::new()).is_err());
        }
    }

    #[test]
    fn of_named_templates_tools_take_theirs() {
        let named = json!([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]);
        let template = ChatTemplate::new("t.json".as_ref(), &named, &Map::new()).unwrap();
        assert_eq!(template.render(&[], &ChatOptions::default()).unwrap(), "plain");
        let options = ChatOptions { tools: Some(json!([])), ..ChatOptions::default() };
        assert_eq!(template.render(&[], &options).unwrap(), "tools");
    }

    #[test]
    fn json_is_pythons() {
        let text = "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ 'é\u{1F600}' | tojson(ensure_ascii=True) }}";
        let rendered = render(text, json!([{"a": [1, "<'>"]}, {}]), &ChatOptions::default());
        let expected =
            "[{\"a\": [1, \"<'>\"]}, {}]|{\n  \"a\": [\n    1,\n    \"<'>\"\n  ]\n}|\"\\u00e9\\ud83d\\ude00\"";
        assert_eq!(rendered, expected);
    }

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(strftime("%d %B %Y, %A", 0).unwrap(), "01 January 1970, Thursday");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", 951_827_696).unwrap(), "2000-02-29 12:34:56");
        assert_eq!(strftime("%d %b %y %a %-d%%", 1_735_689_599).unwrap(), "31 Dec 24 Tue 31%");
        assert!(strftime("%!", 0).is_err() && strftime("%Y", u64::MAX).is_err());
        assert!(render("{{ strftime_now('%Y') }}", json!([]), &ChatOptions::default()).starts_with("20"));
    }
}
