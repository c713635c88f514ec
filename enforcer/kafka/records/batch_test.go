package records

import "testing"

// A header is read in place, whatever it holds.
func FuzzHeader(f *testing.F) {
	f.Add(make([]byte, HeaderLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderLen {
			return
		}
		h := Header(b)
		if n := h.Len(); n < prefixLen-1<<31 || n >= prefixLen+1<<31 {
			t.Errorf("the length %d", n)
		}
		if last := h.LastOffset(); h.Count() > 0 && last-h.BaseOffset() != int64(int32(last-h.BaseOffset())) {
			t.Errorf("from %d to %d", h.BaseOffset(), last)
		}
		if h.Magic() != int8(b[MagicAt]) || h.Transactional() && b[22]&0x10 == 0 {
			t.Errorf("magic %d, transactional %v of %x", h.Magic(), h.Transactional(), b)
		}
		_, _, _ = h.ProducerID(), h.ProducerEpoch(), h.BaseSequence()
	})
}
