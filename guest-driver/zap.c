// SPDX-License-Identifier: GPL-2.0
/*
 * Spare mappings for huge folios of VRAM while what maps them are migration entries.
 *
 * Where a process zaps such an entry, mm takes it for a mapping of the folio: it removes a mapping, and puts a
 * reference, that the entry does not have (docs/kernel-findings.md, 5). Spare ones are there for them to take.
 * As each comes with its reference, they are nothing that keeps mm from moving the folio.
 *
 * May touch a folio's counts, and mm's statistics of them.
 */
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/rmap.h>

#include "helpers.h"

/* More than there are processes that map one folio. */
#define SPARE (1 << 16)

/* What a mapping of the folio as a whole counts in _nr_pages_mapped, as mm/internal.h has it. */
#define ENTIRELY_MAPPED 0x800000

/* Who removes a mapping goes from the large count to the entire one, and must not find the latter too low. */
static void folio_add_mappings(struct folio *folio, int n)
{
	if (n > 0)
		atomic_add(n, &folio->_entire_mapcount);
#ifdef CONFIG_MM_ID
	folio_lock_large_mapcount(folio);
#endif
	atomic_add(n, &folio->_large_mapcount);
#ifdef CONFIG_MM_ID
	folio_unlock_large_mapcount(folio);
#endif
	if (n < 0)
		atomic_add(n, &folio->_entire_mapcount);
}

/*
 * How often the folio is mapped as a whole. Who is about to remove a mapping changes one count after the
 * other, with a spinlock held: it does not take long.
 */
static int folio_settled_mapcount(struct folio *folio)
{
	int looks = 100000;

	while (atomic_read(&folio->_entire_mapcount) != atomic_read(&folio->_large_mapcount) && --looks)
		cpu_relax();
	return folio_mapcount(folio);
}

/*
 * Puts mm's statistics right where mappings were taken that there were not: the nth found n times too little
 * in _nr_pages_mapped, and counted that as pages.
 */
static void folio_count_taken(struct folio *folio, int taken)
{
	int pages = folio_nr_pages(folio);
	int n;

	for (n = 1; n <= taken; n++) {
		int mapped = IS_ENABLED(CONFIG_NO_PAGE_MAPCOUNT) ? 0 : n * ENTIRELY_MAPPED;

		lruvec_stat_mod_folio(folio, NR_ANON_MAPPED, pages + mapped);
		lruvec_stat_mod_folio(folio, NR_ANON_THPS, pages);
	}
}

/*
 * For a folio that nothing should map, just after it was collected. false: somebody was faster, and nobody has
 * the folio any more.
 */
bool farfault_c_folio_hold(struct folio *folio)
{
	int taken;

	if (!folio_try_get(folio)) {
		folio_count_taken(folio, -folio_settled_mapcount(folio));
		return false;
	}
	folio_ref_add(folio, SPARE - 1);
	taken = -folio_settled_mapcount(folio);
	folio_add_mappings(folio, SPARE);
	if (taken > 0) {
		folio_count_taken(folio, taken);
		folio_add_mappings(folio, taken);
		folio_ref_add(folio, taken);
		if (!IS_ENABLED(CONFIG_NO_PAGE_MAPCOUNT))
			atomic_add(taken * ENTIRELY_MAPPED, &folio->_nr_pages_mapped);
	}
	return true;
}

/* For a folio that was held, and that nothing else maps. */
void farfault_c_folio_release(struct folio *folio)
{
	int left = folio_settled_mapcount(folio);

	folio_add_mappings(folio, -left);
	folio_put_refs(folio, left);
}
