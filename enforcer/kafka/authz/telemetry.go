package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// GetTelemetrySubscriptions and PushTelemetry (KIP-714) stand together because they are one conversation. Kafka asks
// for no right: a client pushes metrics of itself, and only those a subscription of the broker's asks for.

func getTelemetrySubscriptions(*Ctx, *kmsg.GetTelemetrySubscriptionsRequest) Verdict {
	return Verdict{}
}

func pushTelemetry(*Ctx, *kmsg.PushTelemetryRequest) Verdict { return Verdict{} }
