// SPDX-License-Identifier: GPL-2.0
//! The virtio bus: drivers, their registration, and devices.
//!
//! Follows `kernel::pci`: a [`Driver`]'s data lives from probe until just after unbind, and
//! `kernel::driver::Registration<Adapter<T>>` is a registered driver. Virtqueues are in
//! [`super::virtqueue`].
//!
//! Not implemented: configuration-change interrupts, legacy devices.
//!
//! C headers: `include/linux/virtio.h`, `include/linux/virtio_config.h`.

use crate::bindings;
use core::{marker::PhantomData, pin::Pin};
use kernel::{
    device::{self, Bound, Core, CoreInternal, DeviceContext, Normal},
    device_id::RawDeviceId,
    driver,
    error::{from_result, to_result},
    prelude::*,
    sync::aref::ARef,
    types::Opaque,
};
use zerocopy::{FromBytes, IntoBytes};

/// The device keeps to version 1 of the specification or later.
pub(crate) const F_VERSION_1: u32 = bindings::VIRTIO_F_VERSION_1;

/// An entry of a driver's table of devices.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct DeviceId(bindings::virtio_device_id);

impl DeviceId {
    /// Devices with the number `device`, of any vendor.
    pub(crate) const fn new(device: u32) -> Self {
        Self(bindings::virtio_device_id {
            device,
            vendor: u32::MAX,
        })
    }
}

// SAFETY: A transparent wrapper of the raw type.
unsafe impl RawDeviceId for DeviceId {
    type RawType = bindings::virtio_device_id;
}

/// A table made by [`virtio_device_table`](crate::virtio_device_table).
pub(crate) type IdTable = &'static dyn kernel::device_id::IdTable<DeviceId, ()>;

/// A device on the virtio bus.
///
/// # Invariants
///
/// A valid `virtio_device`, referenced as long as the value is borrowed.
#[repr(transparent)]
pub(crate) struct Device<Ctx: DeviceContext = Normal>(
    Opaque<bindings::virtio_device>,
    PhantomData<Ctx>,
);

// SAFETY: Shared methods are thread safe.
unsafe impl Send for Device {}
// SAFETY: As above.
unsafe impl Sync for Device {}
// SAFETY: As above; that it is bound belongs to no thread.
unsafe impl Sync for Device<Bound> {}

impl<Ctx: DeviceContext> Device<Ctx> {
    pub(super) fn as_raw(&self) -> *mut bindings::virtio_device {
        self.0.get()
    }
}

impl Device {
    /// The generic device: for messages, also when it is bound no longer.
    pub(crate) fn device(&self) -> ARef<device::Device> {
        let device: &device::Device = self.as_ref();
        device.into()
    }

    /// Its position on the virtio bus.
    pub(crate) fn index(&self) -> u32 {
        // SAFETY: Set before the device is registered, and never changed. Never negative.
        unsafe { (*self.as_raw()).index as u32 }
    }
}

impl Device<Bound> {
    /// Reads the configuration space from its beginning, in words of four bytes, as of one moment.
    ///
    /// Fails with `EINVAL` where `T` is not made of whole words. May sleep.
    pub(crate) fn read_config<T: FromBytes + IntoBytes>(&self) -> Result<T> {
        const WORD: usize = size_of::<u32>();
        if size_of::<T>() % WORD != 0 {
            return Err(EINVAL);
        }
        let mut config = T::new_zeroed();
        let words = size_of::<T>() / WORD;
        let bytes = config.as_mut_bytes().as_mut_ptr().cast();
        // SAFETY: A bound device; there is room for the words.
        unsafe { bindings::farfault_c_virtio_cread_words(self.as_raw(), bytes, words) };
        Ok(config)
    }
}

impl<Ctx: DeviceContext> AsRef<device::Device<Ctx>> for Device<Ctx> {
    fn as_ref(&self) -> &device::Device<Ctx> {
        // SAFETY: The embedded device lives as long, in the same context.
        unsafe { device::Device::from_raw(&raw mut (*self.as_raw()).dev) }
    }
}

kernel::impl_device_context_deref!(unsafe { Device });

/// A virtio driver.
pub(crate) trait Driver {
    /// What exists while a device is bound. Dropped after [`Driver::unbind`].
    type Data<'bound>: Send + 'bound;

    /// The devices that it is for.
    const ID_TABLE: IdTable;

    /// The feature bits that it understands. Those of the transport need not be listed.
    const FEATURES: &'static [u32];

    /// Takes a device into use. Where it fails, all that it made is undone and the device is left.
    fn probe<'bound>(
        dev: &'bound Device<Core<'_>>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound;

    /// The device goes, but still works. It is reset after this.
    fn unbind<'bound>(dev: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) {
        let _ = (dev, data);
    }

    /// The machine goes to sleep, and will take the device's power: its queues must go. Processes are
    /// frozen. If it fails, the machine stays awake, and everything must be as it was.
    fn freeze<'bound>(dev: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) -> Result;

    /// The machine is awake again. The device is as after its reset, with the features of before; the
    /// queues are made anew.
    fn restore<'bound>(dev: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) -> Result;

    /// The machine goes down. The device is reset after this; nothing is unbound.
    fn shutdown<'bound>(dev: &'bound Device<Core<'_>>, data: Pin<&Self::Data<'bound>>) {
        let _ = (dev, data);
    }
}

/// What `kernel::driver::Registration` registers.
pub(crate) struct Adapter<T: Driver>(T);

// SAFETY: `virtio_driver` is `repr(C)` and embeds `driver` there; probe stores a `Data`.
unsafe impl<T: Driver> driver::DriverLayout for Adapter<T> {
    type DriverType = bindings::virtio_driver;
    type DriverData<'bound> = T::Data<'bound>;
    const DEVICE_DRIVER_OFFSET: usize = core::mem::offset_of!(bindings::virtio_driver, driver);
}

// SAFETY: `unregister` undoes `register`.
unsafe impl<T: Driver> driver::RegistrationOps for Adapter<T> {
    unsafe fn register(
        driver: &Opaque<Self::DriverType>,
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> Result {
        let raw = driver.get();
        // SAFETY: Ours alone until it is registered.
        unsafe {
            (*raw).driver.name = name.as_char_ptr();
            (*raw).id_table = T::ID_TABLE.as_ptr();
            (*raw).feature_table = T::FEATURES.as_ptr();
            (*raw).feature_table_size = T::FEATURES.len() as u32;
            (*raw).probe = Some(Self::probe_callback);
            (*raw).remove = Some(Self::remove_callback);
            (*raw).shutdown = Some(Self::shutdown_callback);
            (*raw).freeze = Some(Self::freeze_callback);
            (*raw).restore = Some(Self::restore_callback);
        }
        // SAFETY: Pinned and valid until `unregister`.
        to_result(unsafe { bindings::__register_virtio_driver(raw, module.as_ptr()) })
    }

    unsafe fn unregister(driver: &Opaque<Self::DriverType>) {
        // SAFETY: Registered by `register`.
        unsafe { bindings::unregister_virtio_driver(driver.get()) };
    }
}

impl<T: Driver> Adapter<T> {
    extern "C" fn probe_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The bus calls this with a device that is being bound.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
        from_result(|| {
            let data = T::probe(dev);
            dev.as_ref().set_drvdata(data)?;
            Ok(0)
        })
    }

    extern "C" fn remove_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus calls this with a device that probe has accepted.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
        // SAFETY: Stored by a successful probe, and taken only after this.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        T::unbind(dev, data);
        // The bus insists on a reset here. The driver core drops the data, and with it the queues,
        // when this has returned.
        // SAFETY: A bound device.
        unsafe { bindings::virtio_reset_device(vdev) };
    }

    extern "C" fn freeze_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The bus calls this with a device that probe has accepted.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
        // SAFETY: Stored by a successful probe, and not taken before unbind.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        from_result(|| T::freeze(dev, data).map(|()| 0))
    }

    extern "C" fn restore_callback(vdev: *mut bindings::virtio_device) -> c_int {
        // SAFETY: The bus calls this with a device that probe has accepted.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
        // SAFETY: Stored by a successful probe, and not taken before unbind.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        from_result(|| T::restore(dev, data).map(|()| 0))
    }

    extern "C" fn shutdown_callback(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus calls this with a device that probe has accepted.
        let dev = unsafe { &*vdev.cast::<Device<CoreInternal<'_>>>() };
        // SAFETY: Stored by a successful probe, and not taken before unbind.
        let data = unsafe { dev.as_ref().drvdata_borrow::<T::Data<'_>>() };
        T::shutdown(dev, data);
        // SAFETY: A bound device.
        unsafe { bindings::virtio_device_shutdown(vdev) };
    }
}

/// Declares a driver's [`IdTable`] of virtio device numbers, and the module alias that makes udev
/// load the module.
#[macro_export]
macro_rules! virtio_device_table {
    ($table:ident, $module_table:ident, [$($id:expr),+ $(,)?]) => {
        const $table: ::kernel::device_id::IdArray<
            $crate::kapi::virtio::DeviceId,
            (),
            { [$($id),+].len() },
        > = ::kernel::device_id::IdArray::new_without_index([
            $(($crate::kapi::virtio::DeviceId::new($id), ())),+
        ]);
        ::kernel::module_device_table!("virtio", $module_table, $table);
    };
}
