// Words as the f16 that they hold. Vulkan drivers get this as what it is, a change of type, in kernels that gpu/spirv
// writes; others widen and narrow again, which changes no value.

fn halves(a: u32, b: u32) -> vec4<f16> {
  return vec4<f16>(vec2<f16>(unpack2x16float(a)), vec2<f16>(unpack2x16float(b)));
}
