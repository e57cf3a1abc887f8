// SPDX-License-Identifier: GPL-2.0
/* Out-of-line copies of static inlines and macros that bindgen cannot see. No logic, one call each. */
#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/ioport.h>
#include <linux/memcontrol.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pagemap.h>
#include <linux/sched/clock.h>
#include <linux/sched/signal.h>
#include <linux/spinlock.h>
#include <linux/userfaultfd_k.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "helpers.h"

int farfault_c_virtio_find_vqs(struct virtio_device *vdev, unsigned int nvqs,
			       struct virtqueue **vqs, struct virtqueue_info *info)
{
	return virtio_find_vqs(vdev, nvqs, vqs, info, NULL);
}

void farfault_c_virtio_del_vqs(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

void farfault_c_virtio_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

void farfault_c_virtio_synchronize_cbs(struct virtio_device *vdev)
{
	virtio_synchronize_cbs(vdev);
}

u8 farfault_c_virtio_get_status(struct virtio_device *vdev)
{
	return vdev->config->get_status(vdev);
}

void farfault_c_virtio_cread_words(struct virtio_device *vdev, void *buf, size_t words)
{
	__virtio_cread_many(vdev, 0, buf, words, sizeof(u32));
}

struct page *farfault_c_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long farfault_c_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

bool farfault_c_is_zero_pfn(unsigned long pfn)
{
	return is_zero_pfn(pfn);
}

struct folio *farfault_c_page_folio(struct page *page)
{
	return page_folio(page);
}

unsigned int farfault_c_folio_order(const struct folio *folio)
{
	return folio_order(folio);
}

unsigned long farfault_c_folio_pfn(const struct folio *folio)
{
	return folio_pfn(folio);
}

void farfault_c_folio_lock(struct folio *folio)
{
	folio_lock(folio);
}

void farfault_c_folio_unlock(struct folio *folio)
{
	folio_unlock(folio);
}

void farfault_c_folio_get(struct folio *folio)
{
	folio_get(folio);
}

void farfault_c_folio_put(struct folio *folio)
{
	folio_put(folio);
}

void farfault_c_folio_mark_dirty(struct folio *folio)
{
	folio_mark_dirty(folio);
}

/* Without memory cgroups nothing is charged, and nobody asks for it. */
bool farfault_c_folio_is_charged(struct folio *folio)
{
	return mem_cgroup_disabled() || folio_memcg_charged(folio);
}

bool farfault_c_folio_test_ksm(const struct folio *folio)
{
	return folio_test_ksm(folio);
}

/* Large folios: how hard to try. Single pages are always tried for as page faults do. */
#define MOVABLE_GFP(order, retry)								\
	(!(order) ? GFP_HIGHUSER_MOVABLE :							\
	 GFP_TRANSHUGE | ((retry) ? __GFP_RETRY_MAYFAIL : __GFP_NORETRY))

struct folio *farfault_c_vma_alloc_folio(unsigned int order, bool retry,
					 struct vm_area_struct *vma, unsigned long addr)
{
	return vma_alloc_folio(MOVABLE_GFP(order, retry), order, vma, addr);
}

struct folio *farfault_c_folio_alloc(unsigned int order, bool retry)
{
	return folio_alloc(MOVABLE_GFP(order, retry), order);
}

struct dev_pagemap *farfault_c_folio_pgmap(const struct folio *folio)
{
	return folio->pgmap;
}

void farfault_c_zone_device_folio_init(struct folio *folio, struct dev_pagemap *pgmap,
				       unsigned int order)
{
	zone_device_folio_init(folio, pgmap, order);
}

void farfault_c_release_mem_region(resource_size_t start, resource_size_t n)
{
	release_mem_region(start, n);
}

bool farfault_c_vma_is_anonymous(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma);
}

bool farfault_c_vma_is_dax(struct vm_area_struct *vma)
{
	return vma_is_dax(vma);
}

bool farfault_c_userfaultfd_armed(struct vm_area_struct *vma)
{
	return userfaultfd_armed(vma);
}

bool farfault_c_mmu_notifier_range_blockable(const struct mmu_notifier_range *range)
{
	return mmu_notifier_range_blockable(range);
}

void farfault_c_mmu_interval_set_seq(struct mmu_interval_notifier *mni, unsigned long seq)
{
	mmu_interval_set_seq(mni, seq);
}

bool farfault_c_mmu_interval_read_retry(struct mmu_interval_notifier *mni, unsigned long seq)
{
	return mmu_interval_read_retry(mni, seq);
}

void farfault_c_reinit_completion(struct completion *x)
{
	reinit_completion(x);
}

unsigned long farfault_c_spin_lock_irqsave(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool farfault_c_spin_trylock_irqsave(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void farfault_c_spin_unlock_irqrestore(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

bool farfault_c_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

bool farfault_c_need_resched(void)
{
	return need_resched();
}

u64 farfault_c_local_clock(void)
{
	return local_clock();
}
