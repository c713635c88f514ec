package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// apiVersions needs no right. The broker's list is cut down to what the table has.
func apiVersions(*Ctx, *kmsg.ApiVersionsRequest) Verdict {
	return Verdict{Edit: edit(func(_ *Ctx, resp *kmsg.ApiVersionsResponse) {
		resp.ApiKeys = slices.DeleteFunc(resp.ApiKeys, func(k kmsg.ApiVersionsResponseApiKey) bool {
			return !inTable(k.ApiKey) || k.MaxVersion < Table[k.ApiKey].Min || k.MinVersion > Table[k.ApiKey].Max
		})
		for i := range resp.ApiKeys {
			k := &resp.ApiKeys[i]
			k.MaxVersion = min(k.MaxVersion, Table[k.ApiKey].Max)
			// Of these librdkafka looks at the least version alone, and speaks another: without 0 it takes a broker for one
			// that cannot compress (KAFKA-18659; brokers do not speak it any more), or at which nobody can log in.
			if k.ApiKey != int16(kmsg.Produce) && k.ApiKey != int16(kmsg.SASLHandshake) {
				k.MinVersion = max(k.MinVersion, Table[k.ApiKey].Min)
			}
		}
	})}
}

func inTable(key int16) bool { return key >= 0 && int(key) < len(Table) && Table[key].Decide != nil }
