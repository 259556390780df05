//! How to get a GPU adapter on this system, for a machine that has none.

/// What to install here, in one or two lines.
pub fn advice() -> String {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut text = advice_for(std::env::consts::OS, &release, &kernel);
    if let Ok(backends) = std::env::var("WGPU_BACKEND") {
        text += &format!("\nWGPU_BACKEND is '{backends}': adapters of other backends are not looked for.");
    }
    text
}

/// As [`advice`], for an operating system, its /etc/os-release and its kernel's release.
fn advice_for(os: &str, release: &str, kernel: &str) -> String {
    let software = "runs every kernel on the CPU through Vulkan; for a real GPU install its vendor's Vulkan driver.";
    match os {
        "linux" if kernel.to_lowercase().contains("microsoft") => {
            "WSL: `sudo apt install mesa-vulkan-drivers` gives Vulkan on the CPU; the GPU itself is reached \
             by a lamina built for Windows (DX12 and Vulkan). Both take the driver of Windows."
                .into()
        }
        "linux" => {
            let install = match family(release) {
                Some("debian") => "`sudo apt install mesa-vulkan-drivers libvulkan1`",
                Some("fedora") => "`sudo dnf install mesa-vulkan-drivers vulkan-loader`",
                Some("arch") => "`sudo pacman -S vulkan-swrast vulkan-icd-loader`",
                Some("suse") => "`sudo zypper install libvulkan_lvp libvulkan1`",
                Some("alpine") => "`apk add mesa-vulkan-swrast vulkan-loader`",
                _ => "Mesa's lavapipe driver and the Vulkan loader, from this system's packages,",
            };
            format!("{install} {software}")
        }
        "macos" | "ios" => "macOS has Metal built in from 10.13 on; a virtual machine may hide the GPU.".into(),
        "windows" => "Windows 10 and later have DX12, with WARP on the CPU; install the GPU vendor's driver.".into(),
        "android" | "freebsd" => format!("Mesa's Vulkan drivers: lavapipe {software}"),
        other => format!("{other}: a Vulkan driver and the Vulkan loader are needed; Mesa's lavapipe {software}"),
    }
}

/// The family of a Linux distribution, by ID and ID_LIKE.
fn family(release: &str) -> Option<&'static str> {
    let value = |key: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_string()
    };
    let ids = format!("{} {}", value("ID"), value("ID_LIKE"));
    ids.split_whitespace().find_map(|id| match id {
        "debian" | "ubuntu" => Some("debian"),
        "fedora" | "rhel" | "centos" => Some("fedora"),
        "arch" => Some("arch"),
        "suse" | "opensuse" => Some("suse"),
        "alpine" => Some("alpine"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_system_is_told_its_own_way() {
        for (os, release, kernel, part) in [
            ("linux", "ID=debian\n", "6.1.0", "apt install mesa-vulkan-drivers"),
            ("linux", "NAME=Mint\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n", "6.8", "apt install"),
            ("linux", "ID=fedora\n", "6.8", "dnf install"),
            ("linux", "ID=manjaro\nID_LIKE=arch\n", "6.8", "pacman -S"),
            ("linux", "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n", "6.8", "zypper"),
            ("linux", "", "6.8", "this system's packages"),
            ("linux", "ID=ubuntu\n", "5.15.90.1-microsoft-standard-WSL2", "built for Windows"),
            ("macos", "", "", "Metal"),
            ("windows", "", "", "DX12"),
        ] {
            let advice = advice_for(os, release, kernel);
            assert!(advice.contains(part), "{os} {release}: {advice}");
        }
    }
}
