// SPDX-License-Identifier: GPL-2.0
//! farfault.ko: the driver of the Farfault GPU.
//!
//! The crate's root: the module, and which device it is for.

use kernel::{driver::Registration, prelude::*};

mod bindings;
mod kapi;

/// The loaded module.
#[pin_data]
struct Farfault {
    #[pin]
    _driver: Registration<kapi::virtio::Adapter<Gpu>>,
}

struct Gpu;

virtio_device_table!(TABLE, MODULE_TABLE, [farfault_protocol::config::VIRTIO_ID]);

impl kapi::virtio::Driver for Gpu {
    type Data<'bound> = ();
    const ID_TABLE: kapi::virtio::IdTable = &TABLE;
    const FEATURES: &'static [u32] = &[kapi::virtio::F_VERSION_1];

    fn probe<'bound>(
        dev: &'bound kapi::virtio::Device<kernel::device::Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        dev_info!(dev.as_ref(), "probe\n");
        Ok::<(), Error>(())
    }
}

impl kernel::InPlaceModule for Farfault {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        })
    }
}

module! {
    type: Farfault,
    name: "farfault",
    authors: ["The Farfault authors"],
    description: "Driver of the Farfault virtual GPU",
    license: "GPL v2",
}
