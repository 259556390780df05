//! What wgpu does not tell of a browser.

use js_sys::{Function, Object, Promise, Reflect};
use wasm_bindgen::{JsCast, JsValue};
use wasm_bindgen_futures::JsFuture;

use super::caps::{Caps, DeviceType};

fn get(of: &JsValue, name: &str) -> Option<JsValue> {
    Reflect::get(of, &name.into()).ok().filter(|value| !value.is_undefined() && !value.is_null())
}

/// Comes back after so many milliseconds; promises that were answered meanwhile go first.
pub(super) async fn pause(milliseconds: u32) {
    let promise = Promise::new(&mut |resolve, _| {
        let global = js_sys::global();
        let timer = get(&global, "setTimeout").and_then(|timer| timer.dyn_into::<Function>().ok());
        // Without timers it goes on at once.
        let set = timer.map(|timer| timer.call2(&global, &resolve, &milliseconds.into()));
        if !matches!(set, Some(Ok(_))) {
            let _ = resolve.call0(&JsValue::NULL);
        }
    });
    let _ = JsFuture::from(promise).await;
}

/// The adapter's name, and whether it is a software driver, by `GPUAdapterInfo`: wgpu passes on its
/// description alone, which browsers leave empty.
pub(super) async fn describe(caps: &mut Caps) {
    let text = |info: &JsValue, name: &str| get(info, name).and_then(|text| text.as_string()).unwrap_or_default();
    let Some(info) = info().await else { return };
    let [vendor, architecture, device, description] =
        ["vendor", "architecture", "device", "description"].map(|name| text(&info, name));
    let mut words: Vec<&str> = Vec::new();
    for word in [&vendor, &architecture, &device] {
        if !word.is_empty() && !words.contains(&word.as_str()) {
            words.push(word);
        }
    }
    caps.name = match (description.is_empty(), words.is_empty()) {
        (false, _) => description.clone(),
        (true, false) => words.join(" "),
        (true, true) => "the browser's adapter".into(),
    };
    let all = format!("{vendor} {architecture} {device} {description}").to_lowercase();
    let fallback = get(&info, "isFallbackAdapter").and_then(|value| value.as_bool()).unwrap_or(false);
    if fallback || ["swiftshader", "llvmpipe", "lavapipe", "basic render"].iter().any(|name| all.contains(name)) {
        caps.device_type = DeviceType::Cpu;
    }
    let agent = get(&js_sys::global(), "navigator").map(|navigator| text(&navigator, "userAgent"));
    caps.driver = agent.unwrap_or_default();
}

async fn info() -> Option<JsValue> {
    let gpu = get(&get(&js_sys::global(), "navigator")?, "gpu")?;
    let request: Function = get(&gpu, "requestAdapter")?.dyn_into().ok()?;
    let promise: Promise = request.call1(&gpu, &Object::new()).ok()?.dyn_into().ok()?;
    let adapter: JsValue = JsFuture::from(promise).await.ok()?;
    get(&adapter, "info")
}
