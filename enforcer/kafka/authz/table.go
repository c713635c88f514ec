package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// Table is the version table: every API key a client may use through us, the versions we understand, and who decides
// it. A key without a row is hidden from ApiVersions and refused. Min follows KIP-896 (what Kafka 4 still speaks).
var Table [kmsg.MaxKey + 1]API

// The rows are filled in here because some handlers look into the table themselves.
func init() {
	Table = [kmsg.MaxKey + 1]API{
		// Records.
		kmsg.Produce:              {Min: 3, Max: 13, Decide: handle(produce)},
		kmsg.Fetch:                {Min: 4, Max: 18, Decide: handle(fetch)},
		kmsg.ListOffsets:          {Min: 1, Max: 11, Decide: handle(listOffsets)},
		kmsg.OffsetForLeaderEpoch: {Min: 2, Max: 4, Decide: handle(offsetForLeaderEpoch)},
		kmsg.DeleteRecords:        {Min: 0, Max: 2, Decide: handle(deleteRecords)},

		// Connections.
		kmsg.ApiVersions:      {Min: 0, Max: 5, Decide: handle(apiVersions)},
		kmsg.SASLHandshake:    {Min: 1, Max: 1, Decide: handle(saslHandshake)},
		kmsg.SASLAuthenticate: {Min: 0, Max: 2, Decide: handle(saslAuthenticate)},

		// Topics.
		kmsg.Metadata:                {Min: 0, Max: 13, Decide: handle(metadata)},
		kmsg.DescribeTopicPartitions: {Min: 0, Max: 0, Decide: handle(describeTopicPartitions)},
		kmsg.CreateTopics:            {Min: 2, Max: 7, Decide: handle(createTopics)},
		kmsg.DeleteTopics:            {Min: 1, Max: 6, Decide: handle(deleteTopics)},
		kmsg.CreatePartitions:        {Min: 0, Max: 3, Decide: handle(createPartitions)},

		// Configs, quotas, brokers, controllers.
		kmsg.DescribeConfigs:            {Min: 1, Max: 4, Decide: handle(describeConfigs)},
		kmsg.AlterConfigs:               {Min: 0, Max: 2, Decide: handle(alterConfigs)},
		kmsg.IncrementalAlterConfigs:    {Min: 0, Max: 1, Decide: handle(incrementalAlterConfigs)},
		kmsg.ListConfigResources:        {Min: 0, Max: 1, Decide: handle(listConfigResources)},
		kmsg.DescribeClientQuotas:       {Min: 0, Max: 1, Decide: handle(describeClientQuotas)},
		kmsg.AlterClientQuotas:          {Min: 0, Max: 1, Decide: handle(alterClientQuotas)},
		kmsg.DescribeLogDirs:            {Min: 1, Max: 5, Decide: handle(describeLogDirs)},
		kmsg.AlterReplicaLogDirs:        {Min: 1, Max: 2, Decide: handle(alterReplicaLogDirs)},
		kmsg.ElectLeaders:               {Min: 0, Max: 2, Decide: handle(electLeaders)},
		kmsg.AlterPartitionAssignments:  {Min: 0, Max: 1, Decide: handle(alterPartitionAssignments)},
		kmsg.ListPartitionReassignments: {Min: 0, Max: 0, Decide: handle(listPartitionReassignments)},
		kmsg.DescribeCluster:            {Min: 0, Max: 2, Decide: handle(describeCluster)},
		kmsg.UnregisterBroker:           {Min: 0, Max: 0, Decide: handle(unregisterBroker)},
		kmsg.DescribeQuorum:             {Min: 0, Max: 2, Decide: handle(describeQuorum)},
		kmsg.AddRaftVoter:               {Min: 0, Max: 1, Decide: handle(addRaftVoter)},
		kmsg.RemoveRaftVoter:            {Min: 0, Max: 0, Decide: handle(removeRaftVoter)},
		kmsg.UnregisterController:       {Min: 0, Max: 0, Decide: handle(unregisterController)},
		kmsg.UpdateFeatures:             {Min: 0, Max: 2, Decide: handle(updateFeatures)},

		// Access: ACLs, SCRAM credentials, delegation tokens.
		kmsg.DescribeACLs:                 {Min: 1, Max: 3, Decide: handle(describeACLs)},
		kmsg.CreateACLs:                   {Min: 1, Max: 3, Decide: handle(createACLs)},
		kmsg.DeleteACLs:                   {Min: 1, Max: 3, Decide: handle(deleteACLs)},
		kmsg.DescribeUserSCRAMCredentials: {Min: 0, Max: 0, Decide: handle(describeUserSCRAMCredentials)},
		kmsg.AlterUserSCRAMCredentials:    {Min: 0, Max: 0, Decide: handle(alterUserSCRAMCredentials)},
		kmsg.CreateDelegationToken:        {Min: 1, Max: 3, Decide: handle(createDelegationToken)},
		kmsg.RenewDelegationToken:         {Min: 1, Max: 2, Decide: handle(renewDelegationToken)},
		kmsg.ExpireDelegationToken:        {Min: 1, Max: 2, Decide: handle(expireDelegationToken)},
		kmsg.DescribeDelegationToken:      {Min: 1, Max: 3, Decide: handle(describeDelegationToken)},

		// Transactions and producers.
		kmsg.InitProducerID:       {Min: 0, Max: 5, Decide: handle(initProducerID)},
		kmsg.AddPartitionsToTxn:   {Min: 0, Max: 5, Decide: handle(addPartitionsToTxn)},
		kmsg.AddOffsetsToTxn:      {Min: 0, Max: 4, Decide: handle(addOffsetsToTxn)},
		kmsg.EndTxn:               {Min: 0, Max: 5, Decide: handle(endTxn)},
		kmsg.TxnOffsetCommit:      {Min: 0, Max: 6, Decide: handle(txnOffsetCommit)},
		kmsg.DescribeProducers:    {Min: 0, Max: 0, Decide: handle(describeProducers)},
		kmsg.DescribeTransactions: {Min: 0, Max: 0, Decide: handle(describeTransactions)},
		kmsg.ListTransactions:     {Min: 0, Max: 2, Decide: handle(listTransactions)},
		kmsg.WriteTxnMarkers:      {Min: 1, Max: 2, Decide: handle(writeTxnMarkers)},

		// Groups.
		kmsg.FindCoordinator: {Min: 0, Max: 6, Decide: handle(findCoordinator)},
		kmsg.JoinGroup:       {Min: 0, Max: 9, Decide: handle(joinGroup)},
		kmsg.SyncGroup:       {Min: 0, Max: 5, Decide: handle(syncGroup)},
		kmsg.Heartbeat:       {Min: 0, Max: 4, Decide: handle(heartbeat)},
		kmsg.LeaveGroup:      {Min: 0, Max: 5, Decide: handle(leaveGroup)},
		kmsg.OffsetCommit:    {Min: 2, Max: 10, Decide: handle(offsetCommit)},
		kmsg.OffsetFetch:     {Min: 1, Max: 10, Decide: handle(offsetFetch)},
		kmsg.OffsetDelete:    {Min: 0, Max: 0, Decide: handle(offsetDelete)},
		kmsg.DescribeGroups:  {Min: 0, Max: 6, Decide: handle(describeGroups)},
		kmsg.ListGroups:      {Min: 0, Max: 5, Decide: handle(listGroups)},
		kmsg.DeleteGroups:    {Min: 0, Max: 3, Decide: handle(deleteGroups)},

		// Consumer groups of the new protocol (KIP-848).
		kmsg.ConsumerGroupHeartbeat: {Min: 0, Max: 1, Decide: handle(consumerGroupHeartbeat)},
		kmsg.ConsumerGroupDescribe:  {Min: 0, Max: 1, Decide: handle(consumerGroupDescribe)},

		// Share groups (KIP-932). What their clients used in the preview of Kafka 4.0, version 0, no other Kafka speaks.
		kmsg.ShareGroupHeartbeat:       {Min: 1, Max: 1, Decide: handle(shareGroupHeartbeat)},
		kmsg.ShareGroupDescribe:        {Min: 1, Max: 1, Decide: handle(shareGroupDescribe)},
		kmsg.ShareFetch:                {Min: 1, Max: 2, Decide: handle(shareFetch)},
		kmsg.ShareAcknowledge:          {Min: 1, Max: 2, Decide: handle(shareAcknowledge)},
		kmsg.DescribeShareGroupOffsets: {Min: 0, Max: 1, Decide: handle(describeShareGroupOffsets)},
		kmsg.AlterShareGroupOffsets:    {Min: 0, Max: 0, Decide: handle(alterShareGroupOffsets)},
		kmsg.DeleteShareGroupOffsets:   {Min: 0, Max: 0, Decide: handle(deleteShareGroupOffsets)},

		kmsg.InitializeShareGroupState:  {Min: 0, Max: 0, Decide: shareGroupState},
		kmsg.ReadShareGroupState:        {Min: 0, Max: 0, Decide: shareGroupState},
		kmsg.WriteShareGroupState:       {Min: 0, Max: 1, Decide: shareGroupState},
		kmsg.DeleteShareGroupState:      {Min: 0, Max: 0, Decide: shareGroupState},
		kmsg.ReadShareGroupStateSummary: {Min: 0, Max: 1, Decide: shareGroupState},

		// Streams groups (KIP-1071).
		kmsg.StreamsGroupHeartbeat:                 {Min: 0, Max: 1, Decide: handle(streamsGroupHeartbeat)},
		kmsg.StreamsGroupDescribe:                  {Min: 0, Max: 1, Decide: handle(streamsGroupDescribe)},
		kmsg.StreamsGroupTopologyDescriptionUpdate: {Min: 0, Max: 0, Decide: handle(streamsGroupTopologyDescriptionUpdate)},

		// Telemetry (KIP-714).
		kmsg.GetTelemetrySubscriptions: {Min: 0, Max: 0, Decide: handle(getTelemetrySubscriptions)},
		kmsg.PushTelemetry:             {Min: 0, Max: 0, Decide: handle(pushTelemetry)},
	}
}

// Refused are the keys that get no row, and why: brokers and controllers use them among themselves. Docs show them.
var Refused = map[kmsg.Key]string{
	kmsg.LeaderAndISR:       controllerToBroker,
	kmsg.StopReplica:        controllerToBroker,
	kmsg.UpdateMetadata:     controllerToBroker,
	kmsg.ControlledShutdown: brokerToController + ", with ZooKeeper",

	kmsg.Vote:             raft,
	kmsg.BeginQuorumEpoch: raft,
	kmsg.EndQuorumEpoch:   raft,
	kmsg.FetchSnapshot:    raft,
	kmsg.UpdateRaftVoter:  raft,

	kmsg.AlterPartition:         brokerToController,
	kmsg.Envelope:               brokerToController + ": it carries a client's request with the client's principal",
	kmsg.BrokerRegistration:     brokerToController,
	kmsg.BrokerHeartbeat:        brokerToController,
	kmsg.AllocateProducerIDs:    brokerToController,
	kmsg.AssignReplicasToDirs:   brokerToController,
	kmsg.ControllerRegistration: "controllers to the active controller",
}

const (
	controllerToBroker = "controller to brokers, with ZooKeeper"
	brokerToController = "brokers to the controller"
	raft               = "among the controllers' Raft voters"
)
