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
			if !slices.Contains(fromZero, kmsg.Key(k.ApiKey)) {
				k.MinVersion = max(k.MinVersion, Table[k.ApiKey].Min)
			}
		}
	})}
}

// fromZero keep the minimum of the broker, though what is below ours is refused: librdkafka concludes from version 0
// that a broker can compress (Produce, KAFKA-18659) and has SASL (SaslHandshake, rdkafka_feature.c). It sends later
// ones.
var fromZero = []kmsg.Key{kmsg.Produce, kmsg.SASLHandshake}

func inTable(key int16) bool { return key >= 0 && int(key) < len(Table) && Table[key].Decide != nil }
