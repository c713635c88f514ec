package authz

import (
	"fmt"
	"slices"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// dropped are the rows that begin above version 0, and why.
var dropped = map[kmsg.Key]struct {
	min int16
	why string
}{
	kmsg.Produce:                 {3, kip896},
	kmsg.Fetch:                   {4, kip896},
	kmsg.ListOffsets:             {1, kip896},
	kmsg.OffsetCommit:            {2, kip896},
	kmsg.OffsetFetch:             {1, kip896},
	kmsg.CreateTopics:            {2, kip896},
	kmsg.DeleteTopics:            {1, kip896},
	kmsg.OffsetForLeaderEpoch:    {2, kip896},
	kmsg.WriteTxnMarkers:         {1, kip896},
	kmsg.DescribeACLs:            {1, kip896},
	kmsg.CreateACLs:              {1, kip896},
	kmsg.DeleteACLs:              {1, kip896},
	kmsg.DescribeConfigs:         {1, kip896},
	kmsg.AlterReplicaLogDirs:     {1, kip896},
	kmsg.DescribeLogDirs:         {1, kip896},
	kmsg.CreateDelegationToken:   {1, kip896},
	kmsg.RenewDelegationToken:    {1, kip896},
	kmsg.ExpireDelegationToken:   {1, kip896},
	kmsg.DescribeDelegationToken: {1, kip896},

	kmsg.ShareGroupHeartbeat: {1, preview},
	kmsg.ShareGroupDescribe:  {1, preview},
	kmsg.ShareFetch:          {1, preview},
	kmsg.ShareAcknowledge:    {1, preview},

	kmsg.SASLHandshake: {1, "after version 0 tokens come without a header, like no request"},
}

const (
	kip896  = "Kafka 4 does not speak it (KIP-896)"
	preview = "the preview of KIP-932 in Kafka 4.0, which no other Kafka speaks"
)

// unconsidered lists what kmsg knows and the table does not say anything about. Known gives the newest version of a
// key, and -1 for none.
func unconsidered(table []API, known func(key kmsg.Key) int16) (all []string) {
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	for i, row := range table {
		key, why := kmsg.Key(i), Refused[kmsg.Key(i)]
		name, newest := fmt.Sprintf("%s (key %d)", kmsg.NameForKey(int16(i)), i), known(kmsg.Key(i))
		switch {
		case newest < 0 && (row.Decide != nil || why != ""):
			say("%s: kmsg does not know it", name)
		case newest < 0:
		case row.Decide == nil && why == "":
			say("%s: kmsg knows versions 0-%d, and it has neither a row nor a reason in Refused", name, newest)
		case row.Decide == nil:
		case why != "":
			say("%s: it has a row, and a reason in Refused", name)
		case row.Max > newest || row.Min < 0 || row.Min > row.Max:
			say("%s: the row is for versions %d-%d, kmsg knows 0-%d", name, row.Min, row.Max, newest)
		case row.Min != dropped[key].min, row.Min > 0 && dropped[key].why == "":
			say("%s: the row begins at version %d; those below it that the test has a reason to leave out end before %d", name,
				row.Min, dropped[key].min)
		case row.Max < newest:
			say("%s: kmsg knows versions up to %d, the row ends at %d: raise it with the handler that considers them", name,
				newest, row.Max)
		}
	}
	return all
}

func knownToKmsg(key kmsg.Key) int16 {
	if req := kmsg.RequestForKey(int16(key)); req != nil {
		return req.MaxVersion()
	}
	return -1
}

func TestTheTableConsidersEveryKeyAndVersionOfKmsg(t *testing.T) {
	for _, one := range unconsidered(Table[:], knownToKmsg) {
		t.Error(one)
	}
}

func TestWhatTheTableDoesNotConsiderIsNamed(t *testing.T) {
	newer := func(key kmsg.Key, newest int16) func(kmsg.Key) int16 {
		return func(k kmsg.Key) int16 {
			if k == key {
				return newest
			}
			return knownToKmsg(k)
		}
	}
	without := slices.Clone(Table[:])
	without[kmsg.Fetch] = API{}
	older := slices.Clone(Table[:])
	older[kmsg.ListOffsets].Min = 0
	both := slices.Clone(Table[:])
	both[kmsg.Vote] = Table[kmsg.Fetch]
	for _, c := range []struct {
		table []API
		known func(kmsg.Key) int16
		want  string
	}{
		{Table[:], newer(kmsg.Fetch, Table[kmsg.Fetch].Max+1), "Fetch (key 1): kmsg knows versions up to 19, the row ends " +
			"at 18: raise it with the handler that considers them"},
		{append(slices.Clone(Table[:]), API{}), newer(kmsg.MaxKey+1, 3), fmt.Sprintf("Unknown (key %d): kmsg knows versions "+
			"0-3, and it has neither a row nor a reason in Refused", kmsg.MaxKey+1)},
		{without, knownToKmsg, "Fetch (key 1): kmsg knows versions 0-18, and it has neither a row nor a reason in Refused"},
		{older, knownToKmsg, "ListOffsets (key 2): the row begins at version 0; those below it that the test has a reason " +
			"to leave out end before 1"},
		{both, knownToKmsg, "Vote (key 52): it has a row, and a reason in Refused"},
		{Table[:], newer(kmsg.Vote, -1), "Vote (key 52): kmsg does not know it"},
		{Table[:], newer(kmsg.Fetch, 3), "Fetch (key 1): the row is for versions 4-18, kmsg knows 0-3"},
	} {
		if got := unconsidered(c.table, c.known); !slices.Equal(got, []string{c.want}) {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestEveryRowSaysWhatItTakes(t *testing.T) {
	for key := range kmsg.Key(kmsg.MaxKey + 1) {
		if (Table[key].Decide != nil) != (Requirements[key] != "") {
			t.Errorf("%s: a row and an entry in Requirements go together", key.Name())
		}
	}
}
