package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// judgeGroup tells how an entry for a group is refused, nil when op is allowed.
func (c *Ctx) judgeGroup(name string, op kmsg.ACLOperation) *kerr.Error {
	if c.AllowGroup(name, op) {
		return nil
	}
	return kerr.GroupAuthorizationFailed
}

// partly is the verdict on a request of which something was refused: the reduced request goes to the broker, and merge
// adds the refusals to its answer; to an empty answer of our own when no entry is left to ask for.
func partly[R kmsg.Response](c *Ctx, reduced kmsg.Request, left int, merge func(*Ctx, R)) Verdict {
	if left == 0 {
		resp := as[R](reduced.ResponseKind())
		merge(c, resp)
		return Verdict{Answer: resp}
	}
	return Verdict{Forward: reduced, Edit: edit(merge)}
}

// edit adapts a typed edit of the broker's answer to a verdict.
func edit[R kmsg.Response](f func(*Ctx, R)) func(*Ctx, kmsg.Response) {
	return func(c *Ctx, broker kmsg.Response) { f(c, as[R](broker)) }
}

// weave puts our answers between the broker's, in the order the client asked. ours has an element for each entry of
// the request, nil for those the broker was asked.
func weave[R any](broker []R, ours []*R) []R {
	all := make([]R, 0, len(ours))
	for _, r := range ours {
		switch {
		case r != nil:
			all = append(all, *r)
		case len(broker) > 0:
			all, broker = append(all, broker[0]), broker[1:]
		}
	}
	return append(all, broker...)
}

// repeated tells which keys more than one entry has.
func repeated[T any, K comparable](entries []T, key func(*T) K) map[K]bool {
	times, all := make(map[K]int, len(entries)), map[K]bool{}
	for i := range entries {
		k := key(&entries[i])
		if times[k]++; times[k] > 1 {
			all[k] = true
		}
	}
	return all
}

// once keeps the first entry of each key.
func once[T any, K comparable](entries []T, key func(*T) K) []T {
	return fold(slices.Clone(entries), key, func(_, _ *T) {})
}

// fold joins entries of one key into the first of them: a broker that collects its answer in a map has each key once.
func fold[T any, K comparable](entries []T, key func(*T) K, join func(first, other *T)) []T {
	at := make(map[K]int, len(entries))
	kept := entries[:0]
	for i := range entries {
		k := key(&entries[i])
		if first, twice := at[k]; twice {
			join(&kept[first], &entries[i])
			continue
		}
		at[k] = len(kept)
		kept = append(kept, entries[i])
	}
	return kept
}
