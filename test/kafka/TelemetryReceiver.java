import java.util.List;
import java.util.Map;

import org.apache.kafka.common.metrics.KafkaMetric;
import org.apache.kafka.common.metrics.MetricsReporter;
import org.apache.kafka.server.authorizer.AuthorizableRequestContext;
import org.apache.kafka.server.telemetry.ClientTelemetry;
import org.apache.kafka.server.telemetry.ClientTelemetryPayload;
import org.apache.kafka.server.telemetry.ClientTelemetryReceiver;

/**
 * Makes a broker ask its clients for their metrics (KIP-714): one offers GetTelemetrySubscriptions and PushTelemetry
 * only with a reporter, of its own metrics, that also receives those of clients.
 */
public final class TelemetryReceiver implements MetricsReporter, ClientTelemetry {
    /** The first field of OpenTelemetry's MetricsData, which Protocol Buffers write as a number and a length. */
    private static final byte RESOURCE_METRICS = 1 << 3 | 2;

    @Override
    public ClientTelemetryReceiver clientReceiver() {
        return TelemetryReceiver::receive;
    }

    /** Keeps nothing, and fails over what are no metrics: so does a receiver that reads them. */
    private static void receive(AuthorizableRequestContext context, ClientTelemetryPayload payload) {
        if (payload.data().get(0) != RESOURCE_METRICS) {
            throw new IllegalArgumentException("no metrics");
        }
    }

    @Override
    public void configure(Map<String, ?> configs) {}

    @Override
    public void init(List<KafkaMetric> metrics) {}

    @Override
    public void metricChange(KafkaMetric metric) {}

    @Override
    public void metricRemoval(KafkaMetric metric) {}

    @Override
    public void close() {}
}
