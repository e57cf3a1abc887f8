/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Out-of-line copies of static inlines and macros that bindgen cannot see. No logic, one call each.
 * Read by helpers.c and by bindgen.
 */
#ifndef FARFAULT_HELPERS_H
#define FARFAULT_HELPERS_H

#include <linux/spinlock_types.h>
#include <linux/types.h>

struct completion;
struct dev_pagemap;
struct folio;
struct mmu_interval_notifier;
struct mmu_notifier_range;
struct page;
struct virtio_device;
struct virtqueue;
struct virtqueue_info;
struct vm_area_struct;

int farfault_c_virtio_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
			       struct virtqueue **vqs, struct virtqueue_info *info);
void farfault_c_virtio_del_vqs(struct virtio_device *vdev);
void farfault_c_virtio_device_ready(struct virtio_device *vdev);
void farfault_c_virtio_synchronize_cbs(struct virtio_device *vdev);
u8 farfault_c_virtio_get_status(struct virtio_device *vdev);
void farfault_c_virtio_cread_words(struct virtio_device *vdev, void *buf, size_t words);

struct page *farfault_c_pfn_to_page(unsigned long pfn);
unsigned long farfault_c_page_to_pfn(const struct page *page);
bool farfault_c_is_zero_pfn(unsigned long pfn);
struct folio *farfault_c_page_folio(struct page *page);
unsigned int farfault_c_folio_order(const struct folio *folio);
unsigned long farfault_c_folio_pfn(const struct folio *folio);
void farfault_c_folio_lock(struct folio *folio);
void farfault_c_folio_unlock(struct folio *folio);
void farfault_c_folio_get(struct folio *folio);
void farfault_c_folio_put(struct folio *folio);
void farfault_c_folio_mark_dirty(struct folio *folio);
bool farfault_c_folio_is_charged(struct folio *folio);
bool farfault_c_folio_test_ksm(const struct folio *folio);
bool farfault_c_folio_hold(struct folio *folio);
void farfault_c_folio_release(struct folio *folio);
struct folio *farfault_c_vma_alloc_folio(unsigned int order, bool retry,
					 struct vm_area_struct *vma, unsigned long addr);
struct folio *farfault_c_folio_alloc(unsigned int order, bool retry);
struct dev_pagemap *farfault_c_folio_pgmap(const struct folio *folio);
void farfault_c_zone_device_folio_init(struct folio *folio, struct dev_pagemap *pgmap,
				       unsigned int order);
void farfault_c_release_mem_region(resource_size_t start, resource_size_t n);

bool farfault_c_vma_is_anonymous(struct vm_area_struct *vma);
bool farfault_c_vma_is_dax(struct vm_area_struct *vma);
bool farfault_c_userfaultfd_armed(struct vm_area_struct *vma);

bool farfault_c_mmu_notifier_range_blockable(const struct mmu_notifier_range *range);
void farfault_c_mmu_interval_set_seq(struct mmu_interval_notifier *mni, unsigned long seq);
bool farfault_c_mmu_interval_read_retry(struct mmu_interval_notifier *mni, unsigned long seq);

void farfault_c_reinit_completion(struct completion *x);
bool farfault_c_fatal_signal_pending(void);
bool farfault_c_need_resched(void);
u64 farfault_c_local_clock(void);

unsigned long farfault_c_spin_lock_irqsave(spinlock_t *lock);
bool farfault_c_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags);
void farfault_c_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags);

void farfault_c_trace_fault(u32 device, u32 context, u64 address, u32 access, int result,
			    u64 pages);
void farfault_c_trace_migrate(u32 device, u32 context, u64 start, u64 end, u32 direction,
			      u32 cause, u64 moved, u64 nr);
void farfault_c_trace_invalidate(u32 device, u32 context, u64 start, u64 end, u32 event,
				 bool blocked);

#endif
