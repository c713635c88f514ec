package authz

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
)

func TestRowsStayWithinTheVersionsKmsgKnows(t *testing.T) {
	var without []string
	for key := range int16(kmsg.MaxKey + 1) {
		row, req := Table[key], kmsg.RequestForKey(key)
		switch {
		case req == nil:
			if row.Decide != nil {
				t.Errorf("key %d has a row, but kmsg does not know it", key)
			}
		case row.Decide == nil:
			without = append(without, kmsg.NameForKey(key))
		case row.Min < 0 || row.Min > row.Max || row.Max > req.MaxVersion():
			t.Errorf("%s: versions %d-%d, kmsg knows 0-%d", kmsg.NameForKey(key), row.Min, row.Max, req.MaxVersion())
		}
	}
	t.Logf("hidden and refused, for want of a row: %v", without)
}
